/* Prints how many thousand ticks per second this processor's time stamp counter makes; runs on the host. */
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC_RAW, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int main(void) {
  struct timespec wait = {0, 100 * 1000 * 1000};
  double begin = seconds();
  unsigned long long first = __rdtsc();
  nanosleep(&wait, NULL);
  double took = seconds() - begin;
  printf("%.0f\n", (double)(__rdtsc() - first) / took / 1e3);
  return 0;
}
