/* Files. Everything is done with the rights of the sandbox's user (`files_act`), so nothing is changed here that its
 * programs could not change. Links are followed, inside only: there is no outside. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define READ_MOST 262144

struct writing {
  struct writing *next;
  uint32_t id;
  int fd;
  unsigned mode;
  long long mtime_ns;
  char *path, *aside;
};
static struct writing *writings;

void files_act(bool as_base) {
  static uid_t own_uid;
  static gid_t own_gid;
  if (as_base) {
    own_uid = geteuid();
    own_gid = getegid();
    if (base.gid != own_gid && setegid(base.gid) < 0) perror("agent: group");
    if (base.uid != own_uid && seteuid(base.uid) < 0) perror("agent: user");
  } else {
    if (geteuid() != own_uid && seteuid(own_uid) < 0) _exit(72);
    if (getegid() != own_gid && setegid(own_gid) < 0) _exit(72);
  }
}

char *absolute(const char *path) {
  char *full = NULL;
  if (*path == '/') return must(strdup(path));
  if (asprintf(&full, "%s/%s", base.cwd, path) < 0) full = NULL;
  return must(full);
}

int make_folders(const char *path, unsigned mode) {
  char *copy = must(strdup(path));
  int error = 0;
  struct stat s;
  for (char *at = copy + 1; !error; at++) {
    at = strchr(at, '/');
    if (at) *at = 0;
    if (mkdir(copy, at ? 0755 : mode) < 0 && (stat(copy, &s) < 0 || !S_ISDIR(s.st_mode)))
      error = errno == EEXIST ? ENOTDIR : errno;
    if (!at) break;
    *at = '/';
  }
  free(copy);
  return error;
}

static int make_parents(const char *path) {
  const char *last = strrchr(path, '/');
  if (!last || last == path) return 0;
  char *folder = must(strndup(path, (size_t)(last - path)));
  int error = make_folders(folder, 0755);
  free(folder);
  return error;
}

/* A regular file, without waiting for a FIFO and without the links of /proc that lead out of all rules. */
static int open_file(const char *path) {
  struct open_how how = {.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, .resolve = RESOLVE_NO_MAGICLINKS};
  int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
  if (fd < 0 && errno == ENOSYS) fd = open(path, (int)how.flags);
  struct stat s;
  if (fd >= 0 && (fstat(fd, &s) < 0 || !S_ISREG(s.st_mode))) {
    close(fd);
    errno = S_ISDIR(s.st_mode) ? EISDIR : EINVAL;
    return -1;
  }
  return fd;
}

static void read_file(const struct frame *f, const char *path) {
  static char data[READ_MOST];
  long long offset = number(f, "offset", 0), length = number(f, "length", READ_MOST);
  int fd = open_file(path);
  if (fd < 0) {
    send_fail(f->op, errno, "path");
    return;
  }
  size_t want = length < 0 || length > READ_MOST ? READ_MOST : (size_t)length, got = 0;
  while (got < want) {
    ssize_t n = pread(fd, data + got, want - got, offset + (long long)got);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && !got) {
      send_fail(f->op, errno, "path");
      close(fd);
      return;
    }
    if (n <= 0) break;
    got += (size_t)n;
  }
  close(fd);
  send_frame(DATA, f->op, data, got);
}

static void end_writing(struct writing *w) {
  for (struct writing **at = &writings; *at; at = &(*at)->next)
    if (*at == w) {
      *at = w->next;
      break;
    }
  if (w->fd >= 0) {
    close(w->fd);
    unlink(w->aside);
  }
  free(w->path);
  free(w->aside);
  free(w);
}

static void answer(uint32_t op, int error) {
  if (error) send_fail(op, error, "path");
  else send_frame(OK, op, "", 0);
}

static void begin_writing(const struct frame *f, const char *path) {
  struct writing *w = must(calloc(1, sizeof *w));
  struct stat s;
  int error = 0;
  char real[PATH_MAX];
  *w = (struct writing){.next = writings, .id = f->op, .fd = -1, .mtime_ns = number(f, "mtime_ns", -1)};
  writings = w;
  w->mode = (unsigned)strtoul(field(f, "mode", "644"), NULL, 8) & 07777;
  if (!lstat(path, &s)) {
    if (S_ISLNK(s.st_mode) && realpath(path, real)) {
      path = real;
      if (lstat(path, &s) < 0) error = errno;
    }
    if (!error && !S_ISREG(s.st_mode) && !S_ISLNK(s.st_mode)) error = S_ISDIR(s.st_mode) ? EISDIR : EINVAL;
  } else {
    error = make_parents(path);
  }
  w->path = must(strdup(path));
  const char *last = strrchr(path, '/');
  if (asprintf(&w->aside, "%.*s/.abyssal.%08x.%u", (int)(last - path), path, (unsigned)now_ms(), f->op) < 0)
    must(w->aside = NULL);
  if (!error) {
    w->fd = open(w->aside, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (w->fd < 0) error = errno;
  }
  if (error) {
    answer(f->op, error);
    end_writing(w);
  }
}

static void go_on_writing(const struct frame *f) {
  struct writing *w = writings;
  while (w && w->id != f->op) w = w->next;
  if (!w) return; /* refused before */
  int error = 0;
  if (f->type == ABORT) {
    end_writing(w);
    return;
  }
  for (size_t done = 0; f->type == CHUNK && done < f->size && !error;) {
    ssize_t n = write(w->fd, f->data + done, f->size - done);
    if (n > 0) done += (size_t)n;
    else if (errno != EINTR) error = errno;
  }
  if (f->type == CLOSE) {
    struct timespec times[2] = {{0, UTIME_NOW}, {w->mtime_ns / 1000000000, w->mtime_ns % 1000000000}};
    if (fchmod(w->fd, w->mode) < 0 || (w->mtime_ns >= 0 && futimens(w->fd, times) < 0)) error = errno;
    if (!error && rename(w->aside, w->path) < 0) error = errno;
    if (!error) {
      close(w->fd);
      w->fd = -1;
    }
  }
  if (error || f->type == CLOSE) {
    answer(f->op, error);
    end_writing(w);
  }
}

static void describe(struct bytes *b, int folder, const char *name, const struct stat *s) {
  char kind[2] = {S_ISREG(s->st_mode) ? 'f' : S_ISDIR(s->st_mode) ? 'd' : S_ISLNK(s->st_mode) ? 'l' : 'o', 0};
  char target[PATH_MAX];
  put(b, "kind", kind);
  put_number(b, "size", s->st_size);
  put_octal(b, "mode", s->st_mode & 07777);
  put_number(b, "mtime_ns", s->st_mtim.tv_sec * 1000000000LL + s->st_mtim.tv_nsec);
  if (*kind != 'l') return;
  ssize_t size = readlinkat(folder, name, target, sizeof target - 1);
  target[size > 0 ? size : 0] = 0;
  put(b, "target", target);
}

static void list_folder(const struct frame *f, const char *path) {
  long long limit = number(f, "limit", 100000), count = 0;
  DIR *folder = opendir(path);
  struct bytes b = {0};
  struct stat s;
  if (!folder) {
    send_fail(f->op, errno, "path");
    return;
  }
  struct dirent *d = NULL;
  while (count < limit && (d = readdir(folder))) {
    if (!strcmp(d->d_name, ".") || !strcmp(d->d_name, "..")) continue;
    if (fstatat(dirfd(folder), d->d_name, &s, AT_SYMLINK_NOFOLLOW) < 0) continue; /* gone meanwhile */
    put(&b, "name", d->d_name);
    describe(&b, dirfd(folder), d->d_name, &s);
    count++;
    if (b.size > PIECE) send_fields(LISTED, f->op, &b);
    if (queued() > QUEUE_HIGH) flush_all();
  }
  bool more = d && readdir(folder);
  closedir(folder);
  if (b.size) send_fields(LISTED, f->op, &b);
  if (more) put(&b, "more", "1");
  send_fields(OK, f->op, &b);
}

/* Everything below an open folder, with two descriptors however deep it is; closes it. */
static int empty_folder(int at) {
  struct step { struct step *up; char name[NAME_MAX + 1]; dev_t device; ino_t inode; } *steps = NULL, *step;
  struct stat s;
  int error = 0;
  while (!error) {
    DIR *folder = fdopendir(dup(at));
    struct dirent *d;
    char below[NAME_MAX + 1] = "";
    if (!folder) {
      error = errno;
      break;
    }
    rewinddir(folder);
    while (!error && !*below && (d = readdir(folder))) {
      if (!strcmp(d->d_name, ".") || !strcmp(d->d_name, "..")) continue;
      if (!unlinkat(at, d->d_name, 0) || errno == ENOENT) continue;
      if ((errno == EISDIR || errno == EPERM) && !unlinkat(at, d->d_name, AT_REMOVEDIR)) continue;
      if (errno != ENOTEMPTY && errno != EEXIST) error = errno;
      else memcpy(below, d->d_name, sizeof below);
    }
    closedir(folder);
    if (error) break;
    if (*below) {
      int next = openat(at, below, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      if (next < 0 || fstat(at, &s) < 0) {
        error = errno;
        if (next >= 0) close(next);
        break;
      }
      step = must(calloc(1, sizeof *step));
      step->up = steps;
      memcpy(step->name, below, sizeof below);
      step->device = s.st_dev;
      step->inode = s.st_ino;
      steps = step;
      close(at);
      at = next;
      continue;
    }
    if (!steps) break;
    int up = openat(at, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (up < 0 || fstat(up, &s) < 0) error = errno;
    else if (s.st_dev != steps->device || s.st_ino != steps->inode) error = EBUSY; /* somebody moved it */
    else if (unlinkat(up, steps->name, AT_REMOVEDIR) < 0 && errno != ENOENT) error = errno;
    close(at);
    at = up;
    step = steps;
    steps = step->up;
    free(step);
  }
  while ((step = steps)) {
    steps = step->up;
    free(step);
  }
  if (at >= 0) close(at);
  return error;
}

static int remove_all(const char *path) {
  if (!unlink(path)) return 0;
  if (errno != EISDIR && errno != EPERM) return errno;
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return errno;
  int error = empty_folder(fd);
  return error ? error : rmdir(path) < 0 ? errno : 0;
}

static int link_file(const struct frame *f, const char *path) {
  const char *target = field(f, "target", "");
  int error = make_parents(path);
  if (error) return error;
  if (strcmp(field(f, "kind", "sym"), "hard")) return symlink(target, path) < 0 ? errno : 0;
  char *full = absolute(target);
  error = linkat(AT_FDCWD, full, AT_FDCWD, path, 0) < 0 ? errno : 0;
  free(full);
  return error;
}

static int move_file(const char *path, const char *to) {
  char *full = absolute(to);
  int error = make_parents(full);
  if (!error && rename(path, full) < 0) error = errno;
  free(full);
  return error;
}

void files_frame(const struct frame *f) {
  struct stat s;
  struct bytes b = {0};
  if (f->type == CHUNK || f->type == CLOSE || f->type == ABORT) {
    files_act(true);
    go_on_writing(f);
    files_act(false);
    return;
  }
  char *path = absolute(field(f, "path", ""));
  files_act(true);
  switch (f->type) {
    case READ: read_file(f, path); break;
    case WRITE: begin_writing(f, path); break;
    case STAT:
      if (lstat(path, &s) < 0) {
        send_fail(f->op, errno, "path");
      } else {
        describe(&b, AT_FDCWD, path, &s);
        send_fields(OK, f->op, &b);
      }
      break;
    case LIST: list_folder(f, path); break;
    case MKDIR: answer(f->op, make_folders(path, (unsigned)strtoul(field(f, "mode", "755"), NULL, 8) & 07777)); break;
    case MOVE: answer(f->op, move_file(path, field(f, "to", ""))); break;
    case REMOVE: answer(f->op, remove_all(path)); break;
    case LINK: answer(f->op, link_file(f, path)); break;
  }
  files_act(false);
  free(path);
}

void files_renew(void) {
  files_act(true);
  while (writings) end_writing(writings);
  files_act(false);
}
