/* The first program of a virtual machine: it builds the root file system and becomes the agent (sandbox.md 3).
 *
 * It is /init of the initramfs. It loads /modules in the order of their names, mounts read-only EROFS layers and a
 * writable ext4 disk, lays them over each other, makes that the root, and runs /agent from outside of it, so that
 * nothing inside can replace the agent. All that it needs to know stands on the kernel's command line:
 *
 *   abyssal.layers=A,B     serial numbers of disks, lowest first; "A:2" is a disk's second partition
 *   abyssal.scratch=S      serial number of the disk that takes what is written; without it, memory does
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LONGEST = 4096, LAYERS = 32, DISKS = 26, PATIENCE_MS = 20000 };

static char line[LONGEST];

static void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "abyssal boot: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, ": %s\n", strerror(errno));
  va_end(arguments);
  sync();
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

static void mount_at(const char *source, const char *target, const char *kind, unsigned long flags, const char *data) {
  mkdir(target, 0755);
  if (mount(source, target, kind, flags, data) != 0) fail("cannot mount %s (%s) on %s", source, kind, target);
}

static size_t read_text(const char *path, char *text, size_t room) {
  int handle = open(path, O_RDONLY | O_CLOEXEC);
  if (handle < 0) return 0;
  ssize_t got = read(handle, text, room - 1);
  close(handle);
  if (got < 0) got = 0;
  while (got > 0 && (text[got - 1] == '\n' || text[got - 1] == ' ')) got--;
  text[got] = 0;
  return (size_t)got;
}

/* The value of a word of the command line, or NULL. */
static const char *word(const char *name, char *value, size_t room) {
  size_t length = strlen(name);
  for (const char *at = line; (at = strstr(at, name)) != NULL; at += length) {
    if ((at != line && at[-1] != ' ') || at[length] != '=') continue;
    size_t size = strcspn(at + length + 1, " ");
    if (size >= room) size = room - 1;
    memcpy(value, at + length + 1, size);
    value[size] = 0;
    return value;
  }
  return NULL;
}

static int visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

/* Modules are named NN-name.ko. One that finds no device of its kind is no error. */
static void load_modules(void) {
  struct dirent **names;
  int count = scandir("/modules", &names, visible, alphasort);
  for (int i = 0; i < count; i++) {
    char path[512];
    snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0 || (syscall(SYS_finit_module, handle, "", 0) != 0 && errno != EEXIST && errno != ENODEV))
      fail("cannot load the module %s", path);
    close(handle);
    unlink(path); /* the initramfs is memory */
    free(names[i]);
  }
}

/* The device file of a disk with this serial number, and of its partition after a colon. Waits for it. */
static void disk(const char *wanted, char *path, size_t room) {
  char serial[64], found[64], file[64];
  snprintf(serial, sizeof serial, "%s", wanted);
  char *part = strchr(serial, ':');
  if (part) *part++ = 0;
  for (int waited = 0; waited < PATIENCE_MS; waited += 5) {
    for (int i = 0; i < DISKS; i++) {
      snprintf(file, sizeof file, "/sys/block/vd%c/serial", 'a' + i);
      if (!read_text(file, found, sizeof found) || strcmp(found, serial) != 0) continue;
      snprintf(path, room, "/dev/vd%c%s", 'a' + i, part ? part : "");
      if (access(path, F_OK) == 0) return;
    }
    usleep(5000);
  }
  errno = ENODEV;
  fail("there is no disk with the serial number %s", wanted);
}

/* Mount all layers; returns the "lowerdir=" of overlayfs, uppermost first. */
static void mount_layers(char *lower, size_t room) {
  char names[LONGEST], device[64], target[64];
  if (!word("abyssal.layers", names, sizeof names)) {
    errno = EINVAL;
    fail("the command line names no abyssal.layers");
  }
  lower[0] = 0;
  int index = 0;
  for (char *rest, *name = strtok_r(names, ",", &rest); name && index < LAYERS; name = strtok_r(NULL, ",", &rest)) {
    disk(name, device, sizeof device);
    snprintf(target, sizeof target, "/layers/%d", index++);
    mount_at(device, target, "erofs", MS_RDONLY | MS_NODEV, "");
    /* uppermost first: before what is there, with a colon between them */
    size_t size = strlen(target), used = strlen(lower);
    if (size + used + 2 > room) fail("too many layers");
    memmove(lower + size + (used ? 1 : 0), lower, used + 1);
    memcpy(lower, target, size);
    if (used) lower[size] = ':';
  }
}

int main(void) {
  umask(0);
  mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "");
  mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  read_text("/proc/cmdline", line, sizeof line);
  load_modules();

  char lower[LONGEST], options[2 * LONGEST], scratch[64], device[64];
  mkdir("/layers", 0755);
  mount_layers(lower, sizeof lower);
  if (word("abyssal.scratch", scratch, sizeof scratch)) {
    disk(scratch, device, sizeof device);
    mount_at(device, "/scratch", "ext4", MS_NOATIME, "noinit_itable,nobarrier");
  } else {
    mount_at("tmpfs", "/scratch", "tmpfs", MS_NOATIME, "mode=755");
  }
  mkdir("/scratch/upper", 0755);
  mkdir("/scratch/work", 0755);
  snprintf(options, sizeof options, "lowerdir=%s,upperdir=/scratch/upper,workdir=/scratch/work", lower);
  mount_at("overlay", "/root", "overlay", MS_NODEV, options);

  int agent = open("/agent", O_RDONLY | O_CLOEXEC);
  if (agent < 0) fail("the initramfs has no /agent");
  umount2("/dev", MNT_DETACH);
  umount2("/sys", MNT_DETACH);
  umount2("/proc", MNT_DETACH);
  if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
    fail("cannot make the overlay the root");
  char *arguments[] = {"agent", "--init", NULL};
  char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
  fexecve(agent, arguments, environment);
  fail("cannot run the agent");
}
