/* Commands. The agent forks a supervisor for each, the supervisor the program; the agent itself holds the ends of the
 * pipes and moves the bytes. Output is read only as far as the host has given credit, so a slow reader slows the
 * program down. A command with a name outlives its host: the next one finds it, and all output that was not read. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct report { enum { BEGUN, REFUSED, ENDED } kind; int value, what; long long cpu_ms, peak; };
#define STDIN_WINDOW 65536u /* bytes of input that may be on their way */
static const char *const WHAT[] = {"process", "cwd", "user", "program"};
enum { AT_PROCESS, AT_CWD, AT_USER, AT_PROGRAM };

struct op {
  struct op *next;
  uint32_t id;
  pid_t supervisor, pid; /* supervisor is 0 once it has been reaped */
  int reports, out, err, in; /* -1 where closed; for a terminal, out and in are the same descriptor */
  struct bytes input;
  bool tty, keep, input_ends, begun, ended, told, killing, timed_out;
  bool away;              /* its host died, and the next has not asked for it yet */
  char *name;             /* kept, with what the host has not read, until the host has settled it; or NULL */
  struct bytes unread[2]; /* of out and err */
  long long from[2];      /* bytes before these */
  long long before;       /* a number of the host's */
  long long credit, begin, deadline, kill_begin;
  int status;
  long long cpu_ms, peak;
};

struct base base;
static struct op *ops;
static bool strangers;

long long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

bool supervises(pid_t pid) {
  for (struct op *o = ops; o; o = o->next)
    if (o->supervisor == pid) return true;
  return false;
}

static void shut(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

/* What the program needs, gathered before the fork. */
struct plan { uint32_t op; char **argv, **env; const char *cwd; uid_t uid; gid_t gid; bool caps; int stdio[3], slave; };

static const char *env_of(char **env, const char *key) {
  size_t size = strlen(key);
  for (; *env; env++)
    if (!strncmp(*env, key, size) && (*env)[size] == '=') return *env + size + 1;
  return NULL;
}

static char **merge_env(const struct frame *f) {
  size_t count = 0, room = 0;
  char **env;
  while (base.env[count]) count++;
  for (const char *at = NULL; (at = next_field(f, at));) room += !strncmp(at, "env=", 4);
  env = must(calloc(count + room + 1, sizeof *env));
  memcpy(env, base.env, count * sizeof *env);
  for (const char *at = NULL; (at = next_field(f, at));) {
    const char *sign = strchr(at + 4, '=');
    if (strncmp(at, "env=", 4) || !sign) continue;
    size_t size = (size_t)(sign - at) - 4 + 1, i = 0;
    while (i < count && strncmp(env[i], at + 4, size)) i++;
    env[i] = (char *)(uintptr_t)(at + 4);
    if (i == count) count++;
  }
  return env;
}

static int drop_rights(const struct plan *p) {
  prctl(PR_SET_NO_NEW_PRIVS, !p->caps, 0, 0, 0);
  for (int cap = 0; !p->caps && cap < 64; cap++) prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
  if (p->uid != geteuid() || p->gid != getegid()) {
    if (setgroups(1, &p->gid) < 0 || setresgid(p->gid, p->gid, p->gid) < 0) return errno;
    if (setresuid(p->uid, p->uid, p->uid) < 0) return errno;
  }
  if (p->caps) return 0;
  struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
  struct __user_cap_data_struct none[2] = {{0}};
  prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  return syscall(SYS_capset, &head, none) < 0 ? errno : 0;
}

static void refuse(int fd, int error, int what) {
  int pair[2] = {error, what};
  if (write(fd, pair, sizeof pair) < 0) _exit(126);
  _exit(127);
}

/* The program, found along PATH of its own environment. */
static void execute(const struct plan *p) {
  const char *name = p->argv[0], *path = env_of(p->env, "PATH");
  if (strchr(name, '/')) {
    execve(name, p->argv, p->env);
    return;
  }
  int error = ENOENT;
  for (const char *at = path ? path : "/usr/bin:/bin"; *at;) {
    size_t size = strcspn(at, ":");
    char full[4096];
    if (size && size + strlen(name) + 2 < sizeof full) {
      snprintf(full, sizeof full, "%.*s/%s", (int)size, at, name);
      execve(full, p->argv, p->env);
      if (errno != ENOENT && errno != ENOTDIR) error = errno;
    }
    at += size + (at[size] == ':');
  }
  errno = error;
}

static void child(const struct plan *p, int failure) {
  sigset_t none;
  sigemptyset(&none);
  for (int i = 1; i < 65; i++) signal(i, SIG_DFL);
  setsid();
  if (p->slave >= 0 && ioctl(p->slave, TIOCSCTTY, 0) < 0) refuse(failure, errno, AT_PROCESS);
  for (int i = 0; i < 3; i++)
    if (dup2(p->slave >= 0 ? p->slave : p->stdio[i], i) < 0) refuse(failure, errno, AT_PROCESS);
  int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC); /* it goes before the agent does */
  if (fd >= 0) {
    if (write(fd, "1000", 4) < 0) errno = 0;
    close(fd);
  }
  group_enter(p->op);
  int error = drop_rights(p);
  if (error) refuse(failure, error, AT_USER);
  if (chdir(p->cwd) < 0) refuse(failure, errno, AT_CWD);
  sigprocmask(SIG_SETMASK, &none, NULL);
  execute(p);
  refuse(failure, errno, AT_PROGRAM);
}

static void tell(int fd, struct report r) {
  struct rusage u;
  getrusage(RUSAGE_CHILDREN, &u);
  r.cpu_ms = (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000LL + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1000;
  r.peak = u.ru_maxrss * 1024LL;
  if (write(fd, &r, sizeof r) < 0) _exit(1);
}

/* Ends that belong to the agent: held here too, nobody would see an end of input, or that the agent is gone. */
static void close_inherited(void) {
  for (struct op *o = ops; o; o = o->next) {
    shut(&o->out);
    shut(&o->err);
    shut(&o->in);
    shut(&o->reports);
  }
  streams_close_inherited();
  close(channel_in());
  close(channel_out());
}

static void supervise(const struct plan *p, int reports) {
  sigset_t all;
  int failure[2], pair[2], status;
  siginfo_t left;
  close_inherited();
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, NULL);
  setpgid(0, 0);
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  prctl(PR_SET_NAME, "supervisor");
  if (pipe2(failure, O_CLOEXEC) < 0) {
    tell(reports, (struct report){REFUSED, errno, AT_PROCESS, 0, 0});
    _exit(1);
  }
  pid_t pid = fork();
  if (!pid) child(p, failure[1]);
  if (pid < 0) {
    tell(reports, (struct report){REFUSED, errno, AT_PROCESS, 0, 0});
    _exit(1);
  }
  for (int i = 0; i < 3; i++) /* ends that only programs may hold, else nobody would see the end of output */
    if (p->stdio[i] >= 0) close(p->stdio[i]);
  if (p->slave >= 0) close(p->slave);
  close(failure[1]);
  if (read(failure[0], pair, sizeof pair) == sizeof pair) {
    tell(reports, (struct report){REFUSED, pair[0], pair[1], 0, 0});
    _exit(1);
  }
  tell(reports, (struct report){BEGUN, pid, 0, 0, 0});
  for (;;) {
    pid_t gone = wait(&status);
    bool alone = waitid(P_ALL, 0, &left, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD;
    if (gone == pid) tell(reports, (struct report){ENDED, status, alone, 0, 0});
    if (gone < 0 && errno == ECHILD) _exit(0);
  }
}

static int open_terminal(const char *size, int *slave) {
  int rows = 24, columns = 80, unlock = 0, number;
  char path[32];
  sscanf(size, "%d,%d", &rows, &columns);
  int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (master < 0) return -1;
  struct winsize w = {(unsigned short)rows, (unsigned short)columns, 0, 0};
  if (ioctl(master, TIOCSPTLCK, &unlock) < 0 || ioctl(master, TIOCGPTN, &number) < 0) goto failed;
  snprintf(path, sizeof path, "/dev/pts/%d", number);
  *slave = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (*slave < 0) goto failed;
  ioctl(*slave, TIOCSWINSZ, &w);
  return master;
failed:
  close(master);
  return -1;
}

static void nonblocking(int fd) {
  if (fd >= 0) fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Pipes or a terminal; false with errno where there are none left. */
static bool connect_op(struct op *o, struct plan *p, const struct frame *f, int *report_end) {
  int pair[2];
  if (pipe2(pair, O_CLOEXEC) < 0) return false;
  o->reports = pair[0];
  *report_end = pair[1];
  const char *tty = field(f, "tty", NULL);
  if (tty) {
    o->tty = true;
    o->out = o->in = open_terminal(tty, &p->slave);
    if (o->out < 0) return false;
    if (p->uid != geteuid() && fchown(p->slave, p->uid, (gid_t)-1) < 0) errno = 0;
    return true;
  }
  int *ends[2] = {&o->out, &o->err};
  for (int i = 0; i < 2; i++) {
    if (pipe2(pair, O_CLOEXEC) < 0) return false;
    *ends[i] = pair[0];
    p->stdio[1 + i] = pair[1];
    if (p->uid != geteuid() && fchown(pair[1], p->uid, p->gid) < 0) errno = 0; /* for /dev/stdout to open */
  }
  if (number(f, "stdin", 0)) {
    if (pipe2(pair, O_CLOEXEC) < 0) return false;
    o->in = pair[1];
    p->stdio[0] = pair[0];
    if (p->uid != geteuid() && fchown(pair[0], p->uid, p->gid) < 0) errno = 0;
    return true;
  }
  return (p->stdio[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;
}

static void forget(struct op *o) {
  free(o->name);
  o->name = NULL;
  for (int i = 0; i < 2; i++) {
    free(o->unread[i].at);
    o->unread[i] = (struct bytes){0};
  }
}

static void drop_op(struct op *o) {
  for (struct op **at = &ops; *at; at = &(*at)->next)
    if (*at == o) {
      *at = o->next;
      break;
    }
  if (o->in >= 0 && o->in != o->out) shut(&o->in);
  shut(&o->out);
  shut(&o->err);
  shut(&o->reports);
  group_remove(o->id);
  free(o->input.at);
  forget(o);
  free(o);
}

void process_start(const struct frame *f) {
  size_t count = 0;
  char *cwd = absolute(field(f, "cwd", ""));
  struct plan p = {.op = f->op, .cwd = cwd, .stdio = {-1, -1, -1}, .slave = -1, .env = merge_env(f)};
  p.uid = (uid_t)number(f, "uid", base.uid);
  p.gid = (gid_t)number(f, "gid", base.gid);
  p.caps = number(f, "caps", 0) != 0;
  p.argv = must(calloc(1, sizeof *p.argv));
  for (const char *at = NULL; (at = next_field(f, at));) {
    if (strncmp(at, "arg=", 4)) continue;
    p.argv = must(realloc(p.argv, (count + 2) * sizeof *p.argv));
    p.argv[count++] = (char *)(uintptr_t)(at + 4);
    p.argv[count] = NULL;
  }
  struct op *o = must(calloc(1, sizeof *o));
  *o = (struct op){.next = ops, .id = f->op, .reports = -1, .out = -1, .err = -1, .in = -1, .begin = now_ms()};
  ops = o;
  o->keep = number(f, "keep", 0) != 0;
  if (*field(f, "name", "")) o->name = must(strdup(field(f, "name", "")));
  o->before = number(f, "before", 0);
  o->credit = number(f, "window", 0);
  long long timeout = number(f, "timeout_ms", 0);
  o->deadline = timeout > 0 ? o->begin + timeout : 0;
  int end = -1, error = 0;
  if (!count) error = EINVAL;
  else if (!connect_op(o, &p, f, &end)) error = errno;
  else {
    o->supervisor = fork();
    if (!o->supervisor) supervise(&p, end);
    if (o->supervisor < 0) error = errno;
  }
  for (int i = 0; i < 3; i++) shut(&p.stdio[i]);
  shut(&p.slave);
  shut(&end);
  free(p.argv);
  free(p.env);
  free(cwd);
  nonblocking(o->reports);
  nonblocking(o->out);
  nonblocking(o->err);
  nonblocking(o->in);
  if (error) {
    send_fail(o->id, error, WHAT[count ? AT_PROCESS : AT_PROGRAM]);
    o->supervisor = 0;
    drop_op(o);
  }
}

static void took(struct op *o, size_t size) {
  struct bytes b = {0};
  if (!size || o->told || o->away) return;
  put_number(&b, "bytes", (long long)size);
  send_fields(TOOK, o->id, &b);
}

static void feed(struct op *o) {
  size_t done = 0;
  while (o->in >= 0 && done < o->input.size) {
    ssize_t n = write(o->in, o->input.at + done, o->input.size - done);
    if (n > 0) done += (size_t)n;
    else if (n < 0 && errno == EINTR) continue;
    else if (n < 0 && errno == EAGAIN) break;
    else if (o->tty) o->in = -1;
    else shut(&o->in);
  }
  if (o->in < 0) done = o->input.size; /* nobody reads any more */
  took(o, done);
  if (done) memmove(o->input.at, o->input.at + done, o->input.size - done);
  o->input.size -= done;
  if (o->input_ends && !o->input.size && o->in >= 0) {
    if (o->tty && write(o->in, "\4", 1) < 0) errno = 0;
    if (o->tty) o->in = -1;
    else shut(&o->in);
  }
}

static void begin_kill(struct op *o) {
  if (!o->killing) o->kill_begin = now_ms();
  o->killing = true;
}

static void exited(struct op *o);

/* Up to here the host has read. */
static void was_read(struct op *o, const struct frame *f) {
  static const char *const names[] = {"out", "err"};
  for (int i = 0; i < 2; i++) {
    struct bytes *b = &o->unread[i];
    long long done = number(f, names[i], 0) - o->from[i];
    if (done <= 0) continue;
    if (done > (long long)b->size) done = (long long)b->size;
    memmove(b->at, b->at + done, b->size - (size_t)done);
    b->size -= (size_t)done;
    o->from[i] += done;
  }
}

/* What the new host has not read, then on as before. */
static void join(struct op *o, const struct frame *f) {
  o->away = false;
  was_read(o, f);
  o->credit = number(f, "window", 0) - (long long)(o->unread[0].size + o->unread[1].size);
  for (int i = 0; i < 2; i++)
    for (size_t at = 0; at < o->unread[i].size; at += PIECE) {
      size_t left = o->unread[i].size - at;
      send_frame(i ? ERR : OUT, o->id, o->unread[i].at + at, left < PIECE ? left : PIECE);
    }
  if (o->told) exited(o);
  else if (o->input.size < STDIN_WINDOW) took(o, STDIN_WINDOW - o->input.size);
}

static void list_ops(uint32_t op) {
  for (struct op *o = ops; o; o = o->next) {
    struct bytes b = {0};
    if (!o->name) continue;
    put_number(&b, "id", o->id);
    put(&b, "name", o->name);
    put_number(&b, "pid", o->pid);
    put_number(&b, "begun", o->begun);
    put_number(&b, "before", o->before);
    put_number(&b, "out", o->from[0]);
    put_number(&b, "err", o->from[1]);
    put_number(&b, "fed", o->input_ends);
    send_fields(OPERATION, op, &b);
  }
  send_frame(OK, op, "", 0);
}

void process_renew(void) {
  for (struct op *o = ops; o; o = o->next) {
    if (o->name) o->away = true;
    else o->told = true; /* nobody knows it any more; what it writes goes nowhere */
  }
}

void process_frame(const struct frame *f) {
  struct op *o = ops;
  bool of_ended = f->type == SETTLE || f->type == JOIN;
  if (f->type == RUNNING) {
    list_ops(f->op);
    return;
  }
  while (o && (o->id != f->op || (of_ended ? !o->name : o->told))) o = o->next;
  if (!o) return; /* it has ended meanwhile */
  struct winsize w = {0};
  int sign, rows, columns;
  switch (f->type) {
    case STDIN:
      append(&o->input, f->data, f->size);
      feed(o);
      break;
    case END_OF_INPUT:
      o->input_ends = true;
      feed(o);
      break;
    case SIGNAL:
      sign = (int)number(f, "signal", 0);
      if (sign == SIGKILL) begin_kill(o);
      else if (o->begun && !o->ended && sign > 0) kill(-o->pid, sign);
      break;
    case RESIZE:
      if (!o->tty || o->out < 0 || sscanf(field(f, "tty", ""), "%d,%d", &rows, &columns) != 2) break;
      w.ws_row = (unsigned short)rows;
      w.ws_col = (unsigned short)columns;
      ioctl(o->out, TIOCSWINSZ, &w);
      break;
    case CREDIT:
      o->credit += number(f, "bytes", 0);
      was_read(o, f);
      break;
    case SETTLE:
      forget(o);
      o->told = true;
      break;
    case JOIN: join(o, f); break;
  }
}

static void exited(struct op *o) {
  struct bytes b = {0};
  int sign = WIFSIGNALED(o->status) ? WTERMSIG(o->status) : 0;
  put_number(&b, "code", sign ? 128 + sign : WEXITSTATUS(o->status));
  put_number(&b, "signal", sign);
  put_number(&b, "timed_out", o->timed_out);
  struct used u = group_used(o->id);
  if (u.cpu_ms >= 0) o->cpu_ms = u.cpu_ms;
  if (u.peak >= 0) o->peak = u.peak;
  put_number(&b, "oom", u.oom_kills > 0 ? u.oom_kills : 0);
  put_number(&b, "ms", now_ms() - o->begin);
  put_number(&b, "cpu_ms", o->cpu_ms);
  put_number(&b, "peak", o->peak);
  send_fields(EXITED, o->id, &b);
  o->told = true;
}

/* One piece of output; false where nothing came. After the end of a kept command, it is thrown away. */
static bool pump(struct op *o, int *fd, int type) {
  static char piece[PIECE];
  if (*fd < 0) return false;
  size_t room = o->told || o->credit > (long long)PIECE ? PIECE : (size_t)o->credit;
  if (!room) return false;
  ssize_t n = read(*fd, piece, room);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (n <= 0) {
    if (o->in == *fd) o->in = -1;
    shut(fd);
    return false;
  }
  if (o->told) return true;
  o->credit -= n;
  if (o->name) append(&o->unread[type == ERR], piece, (size_t)n);
  send_frame(type, o->id, piece, (size_t)n);
  return true;
}

static void begun(struct op *o, pid_t pid) {
  struct bytes b = {0};
  o->begun = true;
  o->pid = pid;
  put_number(&b, "pid", pid);
  send_fields(STARTED, o->id, &b); /* to a host that has died, it says nothing: the next one asks */
}

static void reported(struct op *o) {
  struct report r;
  while (read(o->reports, &r, sizeof r) == sizeof r) {
    o->cpu_ms = r.cpu_ms;
    o->peak = r.peak;
    if (r.kind == BEGUN) {
      begun(o, r.value);
    } else if (r.kind == REFUSED) {
      send_fail(o->id, r.value, WHAT[r.what]);
      forget(o);
      o->told = o->ended = true;
    } else {
      o->ended = true;
      o->status = r.value;
      if (!o->keep && !r.what) begin_kill(o); /* it left something behind */
    }
  }
}

size_t process_poll(struct pollfd *into, size_t room) {
  size_t count = 0;
  for (struct op *o = ops; o && count + 4 <= room; o = o->next) {
    bool open = o->begun && !o->away && queued() < QUEUE_HIGH && (o->credit > 0 || o->told);
    if (o->reports >= 0 && o->supervisor) into[count++] = (struct pollfd){o->reports, POLLIN, 0};
    if (open && o->out >= 0) into[count++] = (struct pollfd){o->out, POLLIN, 0};
    if (open && o->err >= 0) into[count++] = (struct pollfd){o->err, POLLIN, 0};
    if (o->in >= 0 && o->input.size) into[count++] = (struct pollfd){o->in, POLLOUT, 0};
  }
  return count;
}

static short happened(const struct pollfd *from, size_t count, int fd, short what) {
  for (size_t i = 0; fd >= 0 && i < count; i++)
    if (from[i].fd == fd && from[i].events & what && from[i].revents) return from[i].revents;
  return 0;
}

void process_ready(const struct pollfd *from, size_t count) {
  for (struct op *o = ops; o; o = o->next) {
    reported(o);
    if (happened(from, count, o->in, POLLOUT)) feed(o);
    if (o->away) continue;
    if (happened(from, count, o->out, POLLIN)) pump(o, &o->out, OUT);
    if (happened(from, count, o->err, POLLIN)) pump(o, &o->err, ERR);
  }
}

void reap(void) {
  struct rusage u;
  int status;
  for (pid_t pid; (pid = wait4(-1, &status, WNOHANG, &u)) > 0;) {
    struct op *o = ops;
    while (o && o->supervisor != pid) o = o->next;
    if (!o) continue;
    reported(o);
    o->supervisor = 0;
    o->cpu_ms = (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000LL + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1000;
    if (u.ru_maxrss * 1024LL > o->peak) o->peak = u.ru_maxrss * 1024LL;
    if (WIFSIGNALED(status)) strangers = true; /* what it had below it is ours now */
    if (o->ended) continue;
    o->ended = true;
    o->status = SIGKILL;
    if (!o->begun) begun(o, 0); /* the program was quick to kill it */
  }
}

/* True when all that the program wrote before its end is with the host. */
static bool drained(struct op *o) {
  if (queued() >= QUEUE_HIGH) return false;
  while (pump(o, &o->out, OUT) || pump(o, &o->err, ERR))
    if (queued() >= QUEUE_HIGH) return false;
  return (o->out < 0 && o->err < 0) || o->credit > 0;
}

int process_step(void) {
  int wait = -1;
  long long now = now_ms();
  if (strangers) {
    strangers = kill_strangers();
    wait = 2;
  }
  for (struct op *o = ops, *next; o; o = next) {
    next = o->next;
    if (o->deadline && !o->ended && now >= o->deadline && !o->timed_out) {
      o->timed_out = true;
      begin_kill(o);
    }
    if (o->deadline && !o->ended && !o->timed_out && (wait < 0 || o->deadline - now < wait))
      wait = (int)(o->deadline - now < 60000 ? o->deadline - now : 60000);
    if (o->killing && o->supervisor) {
      group_kill(o->id);
      bool alive = kill_below(o->supervisor);
      if (!alive && now - o->kill_begin > 1000) kill(o->supervisor, SIGKILL); /* somebody stopped it */
      wait = 2;
    }
    if (o->ended && !o->told && !o->away && (o->keep || !o->supervisor) && !strangers && drained(o)) exited(o);
    if (o->told && !o->name && !o->supervisor && (!o->keep || (o->out < 0 && o->err < 0))) drop_op(o);
  }
  return wait;
}
