/* Control groups of a machine: all commands together have the limits that stand on the kernel's command line, and each
 * has a group of its own. The agent stays outside, so it is there to tell when the memory has run out. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define TOP "/sys/fs/cgroup"
#define BOX TOP "/box"

static bool there;

static bool write_to(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool done = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
  close(fd);
  return done;
}

static void in_group(uint32_t op, const char *file, char *into, size_t room) {
  snprintf(into, room, BOX "/op-%u%s", op, file);
}

void groups_begin(void) {
  char word[64];
  if (mount("cgroup2", TOP, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 && errno != EBUSY) {
    perror("agent: control groups");
    return;
  }
  static const char *const each[] = {"+memory", "+pids", "+cpu"};
  for (int i = 0; i < 3; i++) write_to(TOP "/cgroup.subtree_control", each[i]);
  if (mkdir(BOX, 0755) < 0 && errno != EEXIST) return;
  for (int i = 0; i < 3; i++) write_to(BOX "/cgroup.subtree_control", each[i]);
  kernel_word("abyssal.memory", word, sizeof word);
  if (*word && !write_to(BOX "/memory.max", word)) perror("agent: memory limit");
  kernel_word("abyssal.pids", word, sizeof word);
  if (*word && !write_to(BOX "/pids.max", word)) perror("agent: process limit");
  write_to("/proc/self/oom_score_adj", "-1000");
  there = true;
}

void group_enter(uint32_t op) {
  char path[128];
  if (!there) return;
  in_group(op, "", path, sizeof path);
  mkdir(path, 0755);
  in_group(op, "/cgroup.procs", path, sizeof path);
  if (!write_to(path, "0")) perror("agent: group of a command");
}

void group_kill(uint32_t op) {
  char path[128];
  if (!there) return;
  in_group(op, "/cgroup.kill", path, sizeof path);
  write_to(path, "1");
}

/* The number behind a word of a group's file; the whole file where there is no word. */
static long long number_in(uint32_t op, const char *file, const char *word) {
  char path[128], text[4096];
  in_group(op, file, path, sizeof path);
  if (!read_text(path, text, sizeof text)) return -1;
  char *at = word ? strstr(text, word) : text;
  return at ? atoll(at + (word ? strlen(word) : 0)) : -1;
}

struct used group_used(uint32_t op) {
  if (!there) return (struct used){-1, -1, -1};
  long long us = number_in(op, "/cpu.stat", "usage_usec ");
  return (struct used){
    .oom_kills = number_in(op, "/memory.events", "oom_kill "),
    .cpu_ms = us < 0 ? -1 : us / 1000,
    .peak = number_in(op, "/memory.peak", NULL),
  };
}

void group_remove(uint32_t op) {
  char path[128];
  if (!there) return;
  in_group(op, "", path, sizeof path);
  rmdir(path);
}
