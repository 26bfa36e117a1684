/* What the first process of a machine does besides: file systems, loopback, the port, random numbers, power off. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

static void attach(const char *kind, const char *at, unsigned long flags, const char *options) {
  mkdir(at, 0755);
  if (mount(kind, at, kind, flags, options) < 0 && errno != EBUSY) fprintf(stderr, "agent: %s: %s\n", at, strerror(errno));
}

static void loopback_up(void) {
  struct ifreq r = {.ifr_name = "lo"};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  if (!ioctl(fd, SIOCGIFFLAGS, &r)) {
    r.ifr_flags |= IFF_UP | IFF_RUNNING;
    ioctl(fd, SIOCSIFFLAGS, &r);
  }
  close(fd);
}

size_t read_text(const char *path, char *into, size_t room) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t size = fd < 0 ? 0 : read(fd, into, room - 1);
  if (fd >= 0) close(fd);
  into[size > 0 ? size : 0] = 0;
  return size > 0 ? (size_t)size : 0;
}

void kernel_word(const char *key, char *into, size_t room) {
  char line[4096];
  read_text("/proc/cmdline", line, sizeof line);
  char *at = strstr(line, key);
  size_t size = strlen(key);
  bool found = at && (at == line || at[-1] == ' ') && at[size] == '=';
  snprintf(into, room, "%.*s", found ? (int)strcspn(at + size + 1, " \n") : 0, found ? at + size + 1 : "");
}

static int open_port(const char *name) {
  char path[512], text[256];
  if (*name == '/') return open(name, O_RDWR | O_CLOEXEC | O_NOCTTY);
  DIR *folder = opendir("/sys/class/virtio-ports");
  int fd = -1;
  for (struct dirent *d; folder && fd < 0 && (d = readdir(folder));) {
    if (*d->d_name == '.') continue;
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", d->d_name);
    size_t size = read_text(path, text, sizeof text);
    if (size && text[size - 1] == '\n') text[size - 1] = 0;
    if (strcmp(text, name)) continue;
    snprintf(path, sizeof path, "/dev/%s", d->d_name);
    fd = open(path, O_RDWR | O_CLOEXEC);
  }
  if (folder) closedir(folder);
  return fd;
}

int machine_begin(void) {
  char name[256];
  attach("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  attach("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL);
  attach("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
  attach("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
  attach("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
  attach("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
  attach("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
  if (symlink("/proc/self/fd", "/dev/fd") < 0 && errno != EEXIST) perror("agent: /dev/fd");
  if (symlink("/proc/self/fd/0", "/dev/stdin") < 0 && errno != EEXIST) perror("agent: /dev/stdin");
  if (symlink("/proc/self/fd/1", "/dev/stdout") < 0 && errno != EEXIST) perror("agent: /dev/stdout");
  if (symlink("/proc/self/fd/2", "/dev/stderr") < 0 && errno != EEXIST) perror("agent: /dev/stderr");
  loopback_up();
  reboot(RB_DISABLE_CAD);
  groups_begin();
  kernel_word("abyssal.port", name, sizeof name);
  if (!*name) snprintf(name, sizeof name, "abyssal");
  for (int i = 0; i < 1000; i++) {
    int fd = open_port(name);
    struct termios t;
    if (fd >= 0 && !tcgetattr(fd, &t)) { /* a serial line */
      cfmakeraw(&t);
      tcsetattr(fd, TCSANOW, &t);
    }
    if (fd >= 0) return fd;
    usleep(10000);
  }
  fprintf(stderr, "agent: no port %s\n", name);
  machine_end();
}

/* 64 hexadecimal digits into the kernel's generator, counted as random where we may. */
void machine_seed(const char *hex) {
  struct { struct rand_pool_info head; unsigned char seed[32]; } pool = {.head = {256, 32}};
  if (strlen(hex) != 64) return;
  for (int i = 0; i < 32; i++) {
    unsigned value;
    if (sscanf(hex + 2 * i, "%2x", &value) != 1) return;
    pool.seed[i] = (unsigned char)value;
  }
  int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  if (ioctl(fd, RNDADDENTROPY, &pool) < 0 && write(fd, pool.seed, sizeof pool.seed) < 0) perror("agent: seed");
  ioctl(fd, RNDRESEEDCRNG);
  close(fd);
}

void machine_end(void) {
  sync();
  reboot(RB_POWER_OFF);
  reboot(RB_AUTOBOOT);
  for (;;) pause();
}
