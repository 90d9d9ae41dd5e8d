/* Preloaded into the simulator's process.

   The simulator's threads wait for each other by polling shared registers under a mutex and never sleep. With fewer
   cores than threads the one that has work then waits for a time slice. Here a thread that keeps polling offers its
   core to the others; and while nobody uses the engine, the simulated chip's threads sleep. What they compute is
   not touched. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define UNLOCKS_PER_YIELD 16

static int (*real_unlock)(pthread_mutex_t *);
static int idle; /* 1: the chip's threads are to sleep until it is 0 */
static __thread unsigned unlocks;

/* Called by the worker: 1 after some quiet, 0 before it uses the chip again. */
void simulator_idle(int now)
{
    __atomic_store_n(&idle, now, __ATOMIC_SEQ_CST);
    if (!now)
        syscall(SYS_futex, &idle, FUTEX_WAKE_PRIVATE, 64, 0, 0, 0);
}

static int is_chip_thread(void)
{
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    return !strncmp(name, "TPU_", 4) || !strcmp(name, "CORE_MAIN");
}

int pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    if (!real_unlock)
        real_unlock = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    int result = real_unlock(mutex);
    if (++unlocks % UNLOCKS_PER_YIELD == 0) {
        while (__atomic_load_n(&idle, __ATOMIC_SEQ_CST) && is_chip_thread())
            syscall(SYS_futex, &idle, FUTEX_WAIT_PRIVATE, 1, 0, 0, 0);
        sched_yield();
    }
    return result;
}
