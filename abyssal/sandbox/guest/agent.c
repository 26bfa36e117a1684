/* Options and the loop. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

static bool bye;

static void ready(uint32_t op) {
  struct utsname u;
  struct bytes b = {0};
  uname(&u);
  put(&b, "version", VERSION);
  put_number(&b, "pid", getpid());
  put_number(&b, "uid", getuid());
  put(&b, "kernel", u.release);
  put(&b, "arch", u.machine);
  send_fields(READY, op, &b);
}

/* Over what the file has: one that is emptied first is written to the disk at once. */
static void write_line(const char *path, const char *text) {
  struct stat s;
  off_t size = (off_t)strlen(text) + 1;
  int fd = open(path, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0644);
  if (fd < 0) return;
  if (pwrite(fd, text, strlen(text), 0) < 0 || pwrite(fd, "\n", 1, size - 1) < 0) perror(path);
  if (!fstat(fd, &s) && s.st_size > size && ftruncate(fd, size) < 0) perror(path);
  close(fd);
}

/* Who this incarnation is. */
static void identity(const struct frame *f) {
  const char *name = field(f, "hostname", NULL), *id = field(f, "machine_id", NULL);
  long long ns = number(f, "time_ns", 0);
  struct timespec t = {ns / 1000000000, ns % 1000000000};
  machine_seed(field(f, "seed", ""));
  if (base.machine && ns && clock_settime(CLOCK_REALTIME, &t) < 0) perror("agent: clock");
  if (name && *name && sethostname(name, strlen(name)) < 0 && base.machine) perror("agent: host name");
  if (id && *id) write_line("/etc/machine-id", id);
}

static bool empty(const char *path) {
  DIR *folder = opendir(path);
  int count = 0;
  while (folder && count < 3 && readdir(folder)) count++;
  if (folder) closedir(folder);
  return folder && count < 3;
}

/* Connections are of the incarnation in which they began; a machine that only stood still has its seed again. */
static void end_connections(const char *seed) {
  static char known[65];
  if (!strcmp(known, seed)) return;
  snprintf(known, sizeof known, "%s", seed);
  streams_end();
}

static void hello(const struct frame *f) {
  end_connections(field(f, "seed", ""));
  channel_token(field(f, "token", ""));
  if (getpid() == 1) identity(f); /* else this is not a sandbox of its own, but a test on somebody's machine */
  base.uid = (uid_t)number(f, "uid", base.uid);
  base.gid = (gid_t)number(f, "gid", base.gid);
  free(base.cwd);
  base.cwd = must(strdup(field(f, "cwd", "/")));
  for (char **e = base.env; e && *e; e++) free(*e);
  free(base.env);
  size_t count = 0;
  base.env = must(calloc(1, sizeof *base.env));
  for (const char *at = NULL; (at = next_field(f, at));) {
    if (strncmp(at, "env=", 4)) continue;
    base.env = must(realloc(base.env, (count + 2) * sizeof *base.env));
    base.env[count++] = must(strdup(at + 4));
    base.env[count] = NULL;
  }
  struct stat s;
  if (stat(base.cwd, &s) < 0) make_folders(base.cwd, 0755);
  if (!stat(base.cwd, &s) && s.st_uid != base.uid && empty(base.cwd) && chown(base.cwd, base.uid, base.gid) < 0)
    perror("agent: folder");
  ready(f->op);
}

static void handle(const struct frame *f) {
  switch (f->type) {
    case HELLO: hello(f); break;
    case EXEC: process_start(f); break;
    case STDIN: case END_OF_INPUT: case SIGNAL: case RESIZE: case CREDIT: case SETTLE: case JOIN: case RUNNING:
      process_frame(f);
      break;
    case READ: case WRITE: case CHUNK: case CLOSE: case STAT: case LIST: case MKDIR: case MOVE: case REMOVE:
    case LINK: case ABORT: files_frame(f); break;
    case LISTEN: case CONNECT: case SEND: case FINISH: case GRANT: case DROP: streams_frame(f); break;
    case SYNC: sync(); send_frame(OK, f->op, "", 0); break;
    case BYE: bye = true; break;
    default: send_fail(f->op, ENOSYS, "frame");
  }
}

/* Whether another host has taken over; connections and transfers were the old one's, commands are the sandbox's. */
static bool renewed(void) {
  if (!channel_renewed()) return false;
  streams_end();
  files_renew();
  process_renew();
  ready(0);
  return true;
}

static void loop(void) {
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child, NULL);
  int signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
  size_t room = 4096;
  struct pollfd *polls = must(calloc(room, sizeof *polls));
  for (;;) {
    int wait = process_step();
    channel_write();
    polls[0] = (struct pollfd){channel_in(), POLLIN, 0};
    polls[1] = (struct pollfd){queued() ? channel_out() : -1, POLLOUT, 0};
    polls[2] = (struct pollfd){signals, POLLIN, 0};
    size_t count = process_poll(polls + 3, room - 3);
    size_t streams = streams_poll(polls + 3 + count, room - 3 - count);
    if (poll(polls, 3 + count + streams, wait) < 0 && errno != EINTR) return;
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) > 0) {}
    reap();
    process_ready(polls + 3, count);
    streams_ready(polls + 3 + count, streams);
    if (polls[0].revents && !channel_read()) {
      if (!base.machine) return;
      usleep(5000); /* nobody holds the other end of the port now; somebody will again */
    }
    do {
      for (struct frame f; !bye && channel_next(&f);) {
        handle(&f);
        if (queued() > QUEUE_HIGH) flush_all();
      }
    } while (renewed());
    if (bye) return;
  }
}

int main(int argc, char **argv) {
  int fd = -1;
  bool first = getpid() == 1;
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--init")) base.machine = true;
    else if (!strcmp(argv[i], "--fd") && i + 1 < argc) fd = atoi(argv[++i]);
  }
  signal(SIGPIPE, SIG_IGN);
  for (int i = 3; i < 1024; i++) fcntl(i, F_SETFD, FD_CLOEXEC);
  if (base.machine || (fd < 0 && first)) {
    base.machine = true;
    fd = machine_begin();
  }
  if (fd < 0) {
    fprintf(stderr, "usage: agent --fd N | --init\n");
    return 2;
  }
  int out = fd ? fd : 1;
  if (fd <= 2) { /* the channel leaves the numbers that programs use */
    out = fcntl(out, F_DUPFD_CLOEXEC, 3);
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0) {
      for (int i = 0; i < 3; i++) dup2(null, i); /* 2 was a file of the host, which whoever opens it here could fill */
      if (null > 2) close(null);
    }
  }
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  prctl(PR_SET_DUMPABLE, 0); /* programs of the same user must not trace this one */
  if (!geteuid()) setgroups(0, NULL);
  umask(022);
  base.uid = geteuid();
  base.gid = getegid();
  base.cwd = must(strdup("/"));
  base.env = must(calloc(1, sizeof *base.env));
  channel_open(fd, out);
  ready(0);
  loop();
  kill_everything();
  if (base.machine) machine_end();
  return 0;
}
