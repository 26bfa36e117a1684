/* All that a command started. Each command has a supervisor that is the reaper of orphans below it, so a process that
 * forks twice or leaves its session still has the supervisor above it in /proc. Stopped processes cannot fork: a
 * round stops all that it sees and kills only when nobody new has turned up. */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct entry { pid_t pid, parent; char state; bool below; };
struct table { struct entry *at; size_t size, room; };

static bool read_entry(const char *name, struct entry *e) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%.20s/stat", name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  ssize_t size = read(fd, text, sizeof text - 1);
  close(fd);
  if (size <= 0) return false;
  text[size] = 0;
  char *at = strrchr(text, ')'); /* names may hold anything, brackets too */
  int parent;
  if (!at || sscanf(at + 1, " %c %d", &e->state, &parent) != 2) return false;
  e->pid = atoi(name);
  e->parent = parent;
  e->below = false;
  return true;
}

static struct table scan(void) {
  struct table t = {0};
  DIR *folder = opendir("/proc");
  if (!folder) return t;
  for (struct dirent *d; (d = readdir(folder));) {
    if (d->d_name[0] < '1' || d->d_name[0] > '9') continue;
    if (t.size == t.room) {
      t.room = t.room * 2 + 64;
      t.at = must(realloc(t.at, t.room * sizeof *t.at));
    }
    if (read_entry(d->d_name, &t.at[t.size])) t.size++;
  }
  closedir(folder);
  return t;
}

static bool among(const struct table *t, pid_t pid) {
  for (size_t i = 0; i < t->size; i++)
    if (t->at[i].pid == pid) return t->at[i].below;
  return false;
}

/* Mark what lives below root; root = 0 stands for orphans, which hang below this agent itself. */
static size_t mark(struct table *t, pid_t root) {
  size_t count = 0;
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < t->size; i++) {
      struct entry *e = &t->at[i];
      bool child = root ? e->parent == root : e->parent == getpid() && !supervises(e->pid);
      if (e->below || !(child || among(t, e->parent))) continue;
      e->below = more = true;
      count += e->state != 'Z' && e->state != 'X';
    }
  }
  return count;
}

static size_t send_all(const struct table *t, int sign) {
  size_t fresh = 0;
  for (size_t i = 0; i < t->size; i++) {
    const struct entry *e = &t->at[i];
    if (!e->below || e->state == 'Z' || e->state == 'X') continue;
    fresh += e->state != 'T' && e->state != 't';
    kill(e->pid, sign);
  }
  return fresh;
}

static bool round_of(pid_t root) {
  for (int i = 0; i < 64; i++) {
    struct table t = scan();
    size_t alive = mark(&t, root), fresh = send_all(&t, SIGSTOP);
    if (!fresh || i == 63) send_all(&t, SIGKILL);
    free(t.at);
    if (!alive) return false;
    if (!fresh) return true;
  }
  return true;
}

bool kill_below(pid_t root) { return round_of(root); }
bool kill_strangers(void) { return round_of(0); }

void kill_everything(void) {
  for (int i = 0; i < 200; i++) {
    bool alive = kill_below(getpid());
    reap();
    if (!alive) return;
    usleep(2000);
  }
}
