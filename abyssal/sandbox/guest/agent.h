/* The guest agent: runs commands and moves files for the host, over one byte stream (frames.c has the frames).
 *
 * frames.c     frames, fields, the queue towards the host
 * processes.c  commands: start, output, input, end
 * tree.c       all that a command started: found in /proc, stopped, killed
 * files.c      files
 * init.c       what a machine's first process does besides
 * streams.c    connections that the host carries on
 * groups.c     its control groups: limits, what a command used, whether the kernel killed it
 * agent.c      options and the loop
 */
#ifndef ABYSSAL_AGENT_H
#define ABYSSAL_AGENT_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define VERSION "1"
#define FRAME_MAX ((1u << 20) + 5)
#define PIECE 65536u /* of output in one frame */
#define QUEUE_HIGH (1u << 20)

enum { /* host to guest */
  HELLO = 1, EXEC, STDIN, END_OF_INPUT, SIGNAL, RESIZE, CREDIT, SETTLE, JOIN,
  READ = 16, WRITE, CHUNK, CLOSE, STAT, LIST, MKDIR, MOVE, REMOVE, LINK, ABORT,
  SYNC = 32, BYE, RUNNING,
  LISTEN = 40, CONNECT, SEND, FINISH, GRANT, DROP,
};
enum { /* guest to host */
  READY = 64, STARTED, OUT, ERR, EXITED, TOOK, DATA, OK, FAIL, LISTED, OPERATION,
  ACCEPTED = 80, RECEIVED, FINISHED, TAKEN, DROPPED,
};

struct bytes { char *at; size_t size, room; };
struct frame { uint8_t type; uint32_t op; const char *data; size_t size; };

/* frames.c */
void *must(void *memory);
void append(struct bytes *b, const void *data, size_t size);
void put(struct bytes *b, const char *key, const char *value);
void put_number(struct bytes *b, const char *key, long long value);
void put_octal(struct bytes *b, const char *key, unsigned value);
const char *next_field(const struct frame *f, const char *at); /* NULL at the end; at = NULL for the first */
const char *field(const struct frame *f, const char *key, const char *otherwise);
long long number(const struct frame *f, const char *key, long long otherwise);
void channel_open(int in, int out);
short channel_events(bool out);
int channel_in(void), channel_out(void);
bool channel_read(void);   /* false at the end of the stream */
bool channel_next(struct frame *f);
void channel_token(const char *hex); /* by which a host that comes later is known */
bool channel_renewed(void);          /* once: another host has come, nothing is on its way to it */
void channel_write(void);
size_t queued(void);
void send_frame(int type, uint32_t op, const void *data, size_t size);
void send_fields(int type, uint32_t op, struct bytes *b); /* frees b's memory */
void send_fail(uint32_t op, int error, const char *what);
void flush_all(void);

/* processes.c */
extern struct base { uid_t uid; gid_t gid; char *cwd; char **env; bool machine; } base;
long long now_ms(void);
void process_start(const struct frame *f);
void process_frame(const struct frame *f);
void process_renew(void);           /* another host has come: it asks for those that it knows */
size_t process_poll(struct pollfd *into, size_t room); /* how many were filled in */
void process_ready(const struct pollfd *from, size_t count);
int process_step(void); /* what timers want done; milliseconds until it is called again, -1 for when something comes */
void reap(void);
bool supervises(pid_t pid);

/* tree.c */
bool kill_below(pid_t root);    /* one round; false when nothing below lives */
bool kill_strangers(void);      /* the same for orphans of supervisors that died */
void kill_everything(void);

/* files.c */
void files_frame(const struct frame *f);
void files_renew(void); /* what was being written is given up */
int make_folders(const char *path, unsigned mode); /* 0 or errno; of folders that are missing */
char *absolute(const char *path);
void files_act(bool as_base); /* take the identity that file operations have, or the agent's again */

/* streams.c */
void streams_frame(const struct frame *f);
size_t streams_poll(struct pollfd *into, size_t room);
void streams_ready(const struct pollfd *from, size_t count);
void streams_end(void);             /* all of them, and nothing listens any more */
void streams_close_inherited(void); /* in a child that runs no other program */

/* init.c */
int machine_begin(void); /* the channel's fd */
void machine_seed(const char *hex);
void machine_end(void) __attribute__((noreturn));
size_t read_text(const char *path, char *into, size_t room);
void kernel_word(const char *key, char *into, size_t room); /* `key=word` of the kernel's command line */

/* groups.c; all of it does nothing outside of machines */
struct used { long long oom_kills, cpu_ms, peak; }; /* -1 where nobody counts */
void groups_begin(void);
void group_enter(uint32_t op);     /* the calling process */
void group_kill(uint32_t op);
struct used group_used(uint32_t op);
void group_remove(uint32_t op);

#endif
