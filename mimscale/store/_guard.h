/* Copying out of a mapped file whose pages may turn out to be unreadable.
 *
 * A page of a mapping that cannot be had (the file was truncated, the disk answers with an error) comes as SIGBUS, which
 * ends a process. `guarded_copy` returns 0 instead. What is guarded is one memcpy and nothing else: it holds no lock and
 * owns no memory, so it may be left by a jump at any byte.
 *
 * The handler belongs to the process, and others want to know of SIGBUS too (faulthandler, the workers of torch). Ours
 * is put before theirs when it is needed, asks only whether the fault is that of a guarded copy of this thread, and gives
 * way to the one before it when it is not.
 */

#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    sigjmp_buf back;
    const char *from;
    size_t count;
} Guard;

/* Of the guarded copy that this thread is in. Static thread storage: a handler may not run into its allocation. */
static _Thread_local Guard *volatile guard __attribute__((tls_model("initial-exec")));
static struct sigaction handler_before;
static volatile sig_atomic_t has_given_way;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    Guard *mine = guard;
    if (mine && info->si_code > 0) { /* of the kernel, and not of kill() */
        /* For poisoned memory the kernel names a page, which is this large at most. */
        const uintptr_t page = 65536, at = (uintptr_t)info->si_addr, from = (uintptr_t)mine->from;
        if (at + page > from && at < from + mine->count + page) {
            guard = NULL;
            siglongjmp(mine->back, 1);
        }
    }
    /* Not ours: once back, the faulting instruction faults again, and whoever is there now sees it as it was. Who calls
     * us a second time is a handler that hands on to what stood before it, which is us: then nobody is left to ask. */
    struct sigaction none = {.sa_handler = SIG_DFL};
    sigaction(number, has_given_way ? &none : &handler_before, NULL);
    has_given_way = 1;
    if (info->si_code <= 0)
        raise(number);
}

/* Put our handler before all others, unless it is there; call it with the GIL held, before guarded copies. Returns 0, or
 * -1 with errno. */
static int guard_bus_errors(void)
{
    struct sigaction now;
    if (sigaction(SIGBUS, NULL, &now) < 0)
        return -1;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_bus_error)
        return 0;
    handler_before = now;
    has_given_way = 0;
    /* Not blocked while it runs, since it may be left by a jump, which restores no mask; on the alternative stack where
     * a thread has one. */
    struct sigaction ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    return sigaction(SIGBUS, &ours, NULL);
}

/* Copy out of a mapping; returns 0 when a page of it cannot be read. */
static int guarded_copy(void *to, const void *from, size_t count)
{
    Guard mine = {.from = from, .count = count};
    if (sigsetjmp(mine.back, 0))
        return 0;
    guard = &mine;
    atomic_signal_fence(memory_order_seq_cst);
    memcpy(to, from, count);
    atomic_signal_fence(memory_order_seq_cst);
    guard = NULL;
    return 1;
}
