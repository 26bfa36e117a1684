/* Connections that the host carries on: those that programs make to one port here, and those that it asks for to ports
 * of theirs. Nothing is read from a connection beyond what the host has given credit for, and the host sends no more
 * than it was told was taken, so neither side keeps more than a window of it. */
#define _GNU_SOURCE
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 128u /* at once; further ones wait to be accepted */
#define OURS 0x80000000u /* numbers of streams that began here */

struct stream {
  struct stream *next;
  uint32_t id;
  int fd, port;
  struct bytes output;
  bool connecting, over6, read_all, finish, finished;
  long long credit;
};

static struct stream *streams;
static size_t count;
static int listener = -1;
static uint32_t listener_op, last;

static struct stream *stream_new(uint32_t id, int fd) {
  struct stream *s = must(calloc(1, sizeof *s));
  *s = (struct stream){.next = streams, .id = id, .fd = fd};
  streams = s;
  count++;
  return s;
}

static void stream_free(struct stream *s) {
  for (struct stream **at = &streams; *at; at = &(*at)->next)
    if (*at == s) {
      *at = s->next;
      break;
    }
  if (s->fd >= 0) close(s->fd);
  free(s->output.at);
  free(s);
  count--;
}

static void stream_drop(struct stream *s, int error) {
  struct bytes b = {0};
  put_number(&b, "errno", error);
  put(&b, "text", strerror(error));
  send_fields(DROPPED, s->id, &b);
  stream_free(s);
}

static void stop_listening(void) {
  for (struct stream *s = streams, *next; s; s = next) {
    next = s->next;
    if (s->id & OURS) stream_free(s);
  }
  if (listener >= 0) close(listener);
  listener = -1;
}

void streams_end(void) {
  stop_listening();
  while (streams) stream_free(streams);
}

void streams_close_inherited(void) {
  for (struct stream *s = streams; s; s = s->next)
    if (s->fd >= 0) close(s->fd);
  if (listener >= 0) close(listener);
}

static int new_socket(int family) {
  int on = 1, fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd >= 0 && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) errno = 0;
  return fd;
}

/* Instead of what listened before; port 0 is any. */
static void listen_at(const struct frame *f) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof at;
  struct bytes b = {0};
  int on = 1;
  stop_listening();
  at.sin_port = htons((uint16_t)number(f, "port", 0));
  listener = new_socket(AF_INET);
  if (listener >= 0 && setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0) errno = 0;
  if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 64) < 0 ||
      getsockname(listener, (struct sockaddr *)&at, &size) < 0) {
    send_fail(f->op, errno, "listen");
    stop_listening();
    return;
  }
  listener_op = f->op;
  put_number(&b, "port", ntohs(at.sin_port));
  send_fields(OK, f->op, &b);
}

static void accept_one(void) {
  struct bytes b = {0};
  int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
  if (fd < 0) return;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) errno = 0;
  last = (last + 1) & ~OURS;
  struct stream *s = stream_new(last | OURS, fd); /* silent until the host grants it something */
  put_number(&b, "stream", s->id);
  send_fields(ACCEPTED, listener_op, &b);
}

static void refused(struct stream *s, int error) {
  send_fail(s->id, error, "connect");
  stream_free(s);
}

/* To a program's port, by the older address first. */
static void connect_to(struct stream *s) {
  struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((uint16_t)s->port)};
  struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)s->port)};
  four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  six.sin6_addr = in6addr_loopback;
  if (s->fd >= 0) close(s->fd);
  s->fd = new_socket(s->over6 ? AF_INET6 : AF_INET);
  const struct sockaddr *to = s->over6 ? (const struct sockaddr *)&six : (const struct sockaddr *)&four;
  s->connecting = true;
  if (s->fd >= 0 && (!connect(s->fd, to, s->over6 ? sizeof six : sizeof four) || errno == EINPROGRESS)) return;
  if (s->over6 || s->fd < 0) {
    refused(s, s->over6 ? ECONNREFUSED : errno);
    return;
  }
  s->over6 = true;
  connect_to(s);
}

static void connected(struct stream *s) {
  int error = 0;
  socklen_t size = sizeof error;
  if (getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) error = errno;
  if (!error) {
    s->connecting = false;
    send_frame(OK, s->id, "", 0);
  } else if (s->over6) {
    refused(s, ECONNREFUSED);
  } else {
    s->over6 = true;
    connect_to(s);
  }
}

/* Both return false where the stream is no more. */
static bool stream_write(struct stream *s) {
  size_t done = 0;
  while (done < s->output.size) {
    ssize_t n = send(s->fd, s->output.at + done, s->output.size - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n < 0) {
      stream_drop(s, errno);
      return false;
    }
    done += (size_t)n;
  }
  if (done) {
    struct bytes b = {0};
    memmove(s->output.at, s->output.at + done, s->output.size - done);
    s->output.size -= done;
    put_number(&b, "bytes", (long long)done);
    send_fields(TAKEN, s->id, &b);
  }
  if (s->finish && !s->finished && !s->output.size) {
    s->finished = true;
    shutdown(s->fd, SHUT_WR);
  }
  return true;
}

static bool stream_read(struct stream *s) {
  static char piece[PIECE];
  size_t room = s->credit > (long long)PIECE ? PIECE : (size_t)s->credit;
  ssize_t n = read(s->fd, piece, room);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (n < 0) {
    stream_drop(s, errno);
    return false;
  }
  s->read_all = !n;
  s->credit -= n;
  send_frame(n ? RECEIVED : FINISHED, s->id, piece, (size_t)n);
  return true;
}

void streams_frame(const struct frame *f) {
  struct stream *s = streams;
  while (s && s->id != f->op) s = s->next;
  if (f->type == LISTEN) {
    listen_at(f);
  } else if (f->type == CONNECT) {
    if (s || count >= MOST || f->op & OURS) {
      send_fail(f->op, s || f->op & OURS ? EINVAL : EAGAIN, "connect");
      return;
    }
    s = stream_new(f->op, -1);
    s->port = (int)number(f, "port", 0);
    connect_to(s);
  } else if (s && f->type == DROP) {
    stream_free(s);
  } else if (s && !s->connecting && f->type == GRANT) {
    s->credit += number(f, "bytes", 0);
  } else if (s && !s->connecting && f->type == SEND && !s->finish) {
    append(&s->output, f->data, f->size);
    stream_write(s);
  } else if (s && !s->connecting && f->type == FINISH) {
    s->finish = true;
    stream_write(s);
  } /* else it has ended meanwhile */
}

static short wanted(const struct stream *s) {
  bool more = !s->connecting && !s->read_all && s->credit > 0 && queued() < QUEUE_HIGH;
  return (short)((more ? POLLIN : 0) | (s->connecting || s->output.size ? POLLOUT : 0));
}

size_t streams_poll(struct pollfd *into, size_t room) {
  size_t filled = 0;
  bool more = listener >= 0 && count < MOST && queued() < QUEUE_HIGH && room;
  if (more) into[filled++] = (struct pollfd){listener, POLLIN, 0};
  for (struct stream *s = streams; s && filled < room; s = s->next)
    if (wanted(s)) into[filled++] = (struct pollfd){s->fd, wanted(s), 0};
  return filled;
}

void streams_ready(const struct pollfd *from, size_t filled) {
  for (size_t i = 0; i < filled; i++) {
    if (!from[i].revents) continue;
    if (from[i].fd == listener) {
      accept_one();
      continue;
    }
    struct stream *s = streams;
    while (s && s->fd != from[i].fd) s = s->next;
    if (!s) continue;
    if (s->connecting) connected(s);
    else if (!s->output.size || stream_write(s)) {
      if (from[i].events & POLLIN && s->credit > 0 && !s->read_all) stream_read(s);
    }
  }
}
