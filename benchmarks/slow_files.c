/* Makes files below a folder as slow as on a busy parallel file system, for whatever process this is preloaded into.
 *
 * Each request waits SLOW_LATENCY_US and takes one of SLOW_IOPS tickets a second (a request of more than a mebibyte
 * takes one a mebibyte). Covered: read, pread, readv, preadv and their 64-bit and v2 forms, fread of at least a page,
 * and mapped files: a mapping starts without pages, and each first touch reads SLOW_WINDOW bytes around it, as the
 * kernel's read-around does. Not covered: io_uring, raw system calls, opening and listing. There is no page cache for
 * the calls: what is read twice is paid twice. Mapped pages stay until they are unmapped. Who asks what kind of file
 * system it is hears Lustre.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

enum { SLOW_WINDOW = 128 * 1024, SLOW_REQUEST = 1 << 20, MOST_MAPPINGS = 1024 };

static struct { char *start; size_t length; int file; off_t offset; size_t size; } mappings[MOST_MAPPINGS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *folder;
static int64_t latency_ns, ticket_ns, next_ticket_ns;
static struct sigaction previous;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void wait_for(size_t bytes) {
    int64_t tickets = bytes / SLOW_REQUEST + 1, until = now_ns() + latency_ns;
    pthread_mutex_lock(&lock);
    if (next_ticket_ns < until - latency_ns) next_ticket_ns = until - latency_ns;
    next_ticket_ns += tickets * ticket_ns;
    if (next_ticket_ns > until) until = next_ticket_ns;
    pthread_mutex_unlock(&lock);
    struct timespec t = {until / 1000000000, until % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)) {}
}

static int is_slow(int file) {
    char link[64], path[4096];
    if (!folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && !strncmp(path, folder, strlen(folder));
}

static void on_fault(int number, siginfo_t *info, void *context) {
    char *at = info->si_addr;
    for (int i = 0; i < MOST_MAPPINGS; i++) {
        char *start = mappings[i].start;
        if (!start || at < start || at >= start + mappings[i].length) continue;
        size_t first = (size_t)(at - start) / SLOW_WINDOW * SLOW_WINDOW, count = mappings[i].length - first;
        if (count > SLOW_WINDOW) count = SLOW_WINDOW;
        wait_for(count);
        if (mprotect(start + first, count, PROT_READ | PROT_WRITE)) abort();
        for (size_t done = 0; done < count;) {
            long got = syscall(SYS_pread64, mappings[i].file, start + first + done, count - done,
                               mappings[i].offset + (off_t)(first + done));
            if (got <= 0) break; /* the rest of the last page is zero */
            done += got;
        }
        if (mprotect(start + first, count, PROT_READ)) abort();
        return;
    }
    if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) previous.sa_sigaction(number, info, context);
    else { signal(number, SIG_DFL); raise(number); }
}

__attribute__((constructor)) static void start(void) {
    folder = getenv("SLOW_FOLDER");
    if (!folder) return;
    latency_ns = atoll(getenv("SLOW_LATENCY_US")) * 1000;
    ticket_ns = 1000000000 / atoll(getenv("SLOW_IOPS"));
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, &previous);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t read(int f, void *b, size_t n) { if (is_slow(f)) wait_for(n); return syscall(SYS_read, f, b, n); }
ssize_t pread(int f, void *b, size_t n, off_t o) { if (is_slow(f)) wait_for(n); return syscall(SYS_pread64, f, b, n, o); }
ssize_t pread64(int f, void *b, size_t n, off64_t o) { return pread(f, b, n, o); }

static size_t total(const struct iovec *v, int n) {
    size_t bytes = 0;
    while (n--) bytes += v[n].iov_len;
    return bytes;
}

ssize_t readv(int f, const struct iovec *v, int n) {
    if (is_slow(f)) wait_for(total(v, n));
    return syscall(SYS_readv, f, v, n);
}
ssize_t preadv(int f, const struct iovec *v, int n, off_t o) {
    if (is_slow(f)) wait_for(total(v, n));
    return syscall(SYS_preadv, f, v, n, o, 0L);
}
ssize_t preadv64(int f, const struct iovec *v, int n, off64_t o) { return preadv(f, v, n, o); }
ssize_t preadv2(int f, const struct iovec *v, int n, off_t o, int flags) { (void)flags; return preadv(f, v, n, o); }
ssize_t preadv64v2(int f, const struct iovec *v, int n, off64_t o, int flags) { (void)flags; return preadv(f, v, n, o); }

int fstatfs(int f, struct statfs *status) {
    int failed = syscall(SYS_fstatfs, f, status);
    if (!failed && is_slow(f)) status->f_type = 0x0BD00BD0;
    return failed;
}
/* What a program built with 64-bit offsets calls, CPython's extensions among them. The structs are one on 64-bit Linux. */
int fstatfs64(int f, struct statfs64 *status) { return fstatfs(f, (struct statfs *)status); }

size_t fread(void *b, size_t size, size_t n, FILE *f) {
    if (size * n >= 4096 && is_slow(fileno(f))) wait_for(size * n);
    return REAL(fread)(b, size, n, f);
}

void *mmap64(void *at, size_t n, int protection, int flags, int f, off64_t o) {
    if (f < 0 || protection != PROT_READ || !is_slow(f)) return REAL(mmap64)(at, n, protection, flags, f, o);
    char *start = REAL(mmap64)(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return start;
    for (int i = 0; i < MOST_MAPPINGS; i++)
        if (!mappings[i].start) {
            mappings[i].length = (n + 4095) / 4096 * 4096;
            mappings[i].file = dup(f);
            mappings[i].offset = o;
            mappings[i].start = start;
            return start;
        }
    abort();
}
void *mmap(void *at, size_t n, int protection, int flags, int f, off_t o) { return mmap64(at, n, protection, flags, f, o); }

int munmap(void *at, size_t n) {
    for (int i = 0; i < MOST_MAPPINGS; i++)
        if (mappings[i].start && mappings[i].start == at) {
            mappings[i].start = NULL;
            close(mappings[i].file);
        }
    return REAL(munmap)(at, n);
}
