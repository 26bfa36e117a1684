/* Frames both ways: u32 length (little endian, of what follows), u8 type, u32 op, payload. Payloads are bytes, or
 * fields "key=value" that end in NUL.
 *
 * A host may die in the middle of a frame, and another take over the stream. It says so by a token that the first one
 * gave, which no program here can know, and a mark of its own: what was incomplete before them is dropped, and what
 * follows the same two on the way back is for the new one. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int in_fd = -1, out_fd = -1;
static struct bytes incoming, outgoing;
static size_t taken, sent;

#define TOKEN 32u /* bytes; it begins with a length that no frame has */
#define MARK 8u
#define NOWHERE ((size_t)-1)
static char token[TOKEN];
static bool known, renewed;
static size_t token_at = NOWHERE; /* in `incoming` */

void *must(void *memory) {
  if (!memory) {
    static const char text[] = "agent: no memory\n";
    if (write(2, text, sizeof text - 1) < 0) _exit(71);
    _exit(70);
  }
  return memory;
}

void append(struct bytes *b, const void *data, size_t size) {
  if (b->size + size > b->room) {
    b->room = (b->size + size) * 2 + 256;
    b->at = must(realloc(b->at, b->room));
  }
  if (size) memcpy(b->at + b->size, data, size);
  b->size += size;
}

void put(struct bytes *b, const char *key, const char *value) {
  append(b, key, strlen(key));
  append(b, "=", 1);
  append(b, value, strlen(value) + 1);
}

void put_number(struct bytes *b, const char *key, long long value) {
  char text[32];
  snprintf(text, sizeof text, "%lld", value);
  put(b, key, text);
}

void put_octal(struct bytes *b, const char *key, unsigned value) {
  char text[32];
  snprintf(text, sizeof text, "%o", value);
  put(b, key, text);
}

const char *next_field(const struct frame *f, const char *at) {
  at = at ? at + strlen(at) + 1 : f->data;
  const char *end = f->data + f->size;
  return at < end && memchr(at, 0, (size_t)(end - at)) ? at : NULL;
}

const char *field(const struct frame *f, const char *key, const char *otherwise) {
  size_t size = strlen(key);
  for (const char *at = NULL; (at = next_field(f, at));)
    if (!strncmp(at, key, size) && at[size] == '=') return at + size + 1;
  return otherwise;
}

long long number(const struct frame *f, const char *key, long long otherwise) {
  const char *text = field(f, key, NULL);
  return text && *text ? strtoll(text, NULL, 10) : otherwise;
}

void channel_open(int in, int out) {
  in_fd = in;
  out_fd = out;
  fcntl(in, F_SETFL, fcntl(in, F_GETFL) | O_NONBLOCK);
  fcntl(out, F_SETFL, fcntl(out, F_GETFL) | O_NONBLOCK);
  fcntl(in, F_SETFD, FD_CLOEXEC);
  fcntl(out, F_SETFD, FD_CLOEXEC);
}

int channel_in(void) { return in_fd; }
int channel_out(void) { return out_fd; }
size_t queued(void) { return outgoing.size - sent; }

void channel_token(const char *hex) {
  if (strlen(hex) != 2 * TOKEN) return;
  for (size_t i = 0; i < TOKEN; i++) {
    unsigned value;
    if (sscanf(hex + 2 * i, "%2x", &value) != 1) return;
    token[i] = (char)value;
  }
  known = true;
}

static void look_for_token(size_t from) {
  if (!known || token_at != NOWHERE || from >= incoming.size) return;
  const char *at = memmem(incoming.at + from, incoming.size - from, token, TOKEN);
  if (at) token_at = (size_t)(at - incoming.at);
}

bool channel_renewed(void) {
  bool was = renewed;
  renewed = false;
  return was;
}

bool channel_read(void) {
  if (taken) {
    if (token_at != NOWHERE) token_at -= taken;
    memmove(incoming.at, incoming.at + taken, incoming.size - taken);
    incoming.size -= taken;
    taken = 0;
  }
  if (incoming.room < incoming.size + PIECE) {
    incoming.room = incoming.size + 2 * PIECE;
    incoming.at = must(realloc(incoming.at, incoming.room));
  }
  ssize_t got = read(in_fd, incoming.at + incoming.size, incoming.room - incoming.size);
  if (got < 0) return errno == EAGAIN || errno == EINTR;
  size_t before = incoming.size;
  incoming.size += (size_t)got;
  look_for_token(before < TOKEN ? 0 : before - TOKEN + 1);
  return got > 0;
}

static uint32_t word(const char *at) {
  const unsigned char *b = (const unsigned char *)at;
  return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* A new host's token and mark, behind whatever the old one left incomplete. */
static void renew(void) {
  if (token_at == NOWHERE || incoming.size - token_at < TOKEN + MARK) return;
  const char *mark = incoming.at + token_at + TOKEN;
  outgoing.size = sent = 0;
  append(&outgoing, token, TOKEN);
  append(&outgoing, mark, MARK);
  taken = token_at + TOKEN + MARK;
  token_at = NOWHERE;
  renewed = true;
  look_for_token(taken);
}

bool channel_next(struct frame *f) {
  size_t left = (token_at == NOWHERE ? incoming.size : token_at) - taken;
  const char *at = incoming.at + taken;
  if (left < 4) {
    renew();
    return false;
  }
  uint32_t size = word(at);
  if (size == word(token) && known && left < TOKEN) return false; /* the rest of a token is on its way */
  if (size < 5 || size > FRAME_MAX) {
    fprintf(stderr, "agent: a frame of %u bytes\n", size);
    kill_everything();
    _exit(71);
  }
  if (left < 4 + (size_t)size) {
    renew();
    return false;
  }
  *f = (struct frame){(uint8_t)at[4], word(at + 5), at + 9, size - 5};
  taken += 4 + (size_t)size;
  return true;
}

void send_frame(int type, uint32_t op, const void *data, size_t size) {
  uint32_t length = (uint32_t)size + 5;
  unsigned char head[9];
  for (int i = 0; i < 4; i++) {
    head[i] = (unsigned char)(length >> 8 * i);
    head[5 + i] = (unsigned char)(op >> 8 * i);
  }
  head[4] = (unsigned char)type;
  append(&outgoing, head, sizeof head);
  append(&outgoing, data, size);
}

void send_fields(int type, uint32_t op, struct bytes *b) {
  send_frame(type, op, b->at, b->size);
  free(b->at);
  *b = (struct bytes){0};
}

void send_fail(uint32_t op, int error, const char *what) {
  struct bytes b = {0};
  put_number(&b, "errno", error);
  put(&b, "text", strerror(error));
  put(&b, "what", what);
  send_fields(FAIL, op, &b);
}

void channel_write(void) {
  while (queued()) {
    ssize_t done = write(out_fd, outgoing.at + sent, queued());
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) break;
    sent += (size_t)done;
  }
  if (!queued()) {
    sent = outgoing.size = 0;
    if (outgoing.room > 2 * QUEUE_HIGH) {
      free(outgoing.at);
      outgoing = (struct bytes){0};
    }
  } else if (sent > QUEUE_HIGH) {
    memmove(outgoing.at, outgoing.at + sent, queued());
    outgoing.size -= sent;
    sent = 0;
  }
}

/* Wait until the host has taken all: a long answer must not fill the memory. */
void flush_all(void) {
  while (queued()) {
    struct pollfd p = {out_fd, POLLOUT, 0};
    if (poll(&p, 1, -1) < 0 && errno != EINTR) return;
    if (p.revents & (POLLERR | POLLNVAL) || (p.revents & POLLHUP && !base.machine)) return;
    channel_write();
  }
}
