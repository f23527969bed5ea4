/* Breaks a process at its n-th change of the files below a folder: preloaded, it stands before libc's calls.
 *
 * FAULT_FOLDER   the folder, with a slash at its end; without it nothing is counted
 * FAULT_COUNTER  a file that all processes of a command share: how many changes there were, and which one was hit
 * FAULT_AT       n, from 1 on; 0 only counts
 * FAULT_KIND     kill, term: a signal before the call; torn: half of a write, then a kill;
 *                full, broken, readonly: every write from the n-th on fails, with ENOSPC, EIO or EROFS;
 *                clock: the clock goes back a day
 *
 * A warm process that forks a child for each command has the child call fault_begin() when it has set these.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define DAY 86400
enum { PROCEED, FAIL, TEAR };
struct shared {
    volatile long count;
    volatile long hit;
    char what[PATH_MAX + 64];
};
static struct shared *shared;
static const char *folder, *kind = "";
static long at;

__attribute__((constructor)) void fault_begin(void)
{
    const char *counter = getenv("FAULT_COUNTER"), *number = getenv("FAULT_AT");

    folder = getenv("FAULT_FOLDER");
    kind = getenv("FAULT_KIND") ? getenv("FAULT_KIND") : "";
    at = number ? atol(number) : 0;
    shared = NULL;
    if (!folder || !counter)
        return;
    int file = syscall(SYS_openat, AT_FDCWD, counter, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (file < 0 || syscall(SYS_ftruncate, file, sizeof *shared) < 0)
        return;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED)
        shared = NULL;
    syscall(SYS_close, file);
}

/* Whether a path lies below the folder, and is not of the counter's own. */
static int below(const char *path)
{
    char absolute[PATH_MAX];

    if (!shared || !path)
        return 0;
    if (path[0] != '/') {
        if (!getcwd(absolute, sizeof absolute))
            return 0;
        size_t length = strlen(absolute);
        snprintf(absolute + length, sizeof absolute - length, "/%s", path);
        path = absolute;
    }
    return !strncmp(path, folder, strlen(folder));
}

static const char *path_of(int file)
{
    static __thread char path[PATH_MAX];
    char link[64];

    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') /* a pipe has a name of another form */
        return NULL;
    path[length] = 0;
    return path;
}

/* The error of every write from the n-th on; 0 for a fault of another kind. */
static int failure(void)
{
    return !strcmp(kind, "full") ? ENOSPC : !strcmp(kind, "broken") ? EIO : !strcmp(kind, "readonly") ? EROFS : 0;
}

/* Count one change, and say what is to become of it. */
static int change(const char *call, const char *path, int writes)
{
    if (!below(path))
        return PROCEED;
    long n = __sync_add_and_fetch(&shared->count, 1);
    int fails = failure();
    if (!at || n < at || (n > at && !fails))
        return PROCEED;
    if (!shared->hit && (!fails || writes)) {
        shared->hit = n;
        snprintf(shared->what, sizeof shared->what, "%s %s", call, path + strlen(folder) * (path[0] == '/'));
    }
    int tears = !strcmp(kind, "torn") && !strcmp(call, "write");
    if (!strcmp(kind, "kill") || (!strcmp(kind, "torn") && !tears))
        syscall(SYS_kill, getpid(), SIGKILL);
    if (!strcmp(kind, "term"))
        syscall(SYS_kill, getpid(), SIGTERM);
    if (tears)
        return TEAR;
    if (fails && writes) {
        errno = fails;
        return FAIL;
    }
    return PROCEED;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define DIE() syscall(SYS_kill, getpid(), SIGKILL)

static int changes(int flags) { return (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY; }

#define OPEN(name, parameters, arguments)                                          \
    int name parameters                                                            \
    {                                                                              \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;  \
        va_end(rest);                                                              \
        if (changes(flags) && change("open", path, flags & O_CREAT) == FAIL)       \
            return -1;                                                             \
        return NEXT(name) arguments;                                               \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at_folder, const char *path, int flags, ...), (at_folder, path, flags, mode))
OPEN(openat64, (int at_folder, const char *path, int flags, ...), (at_folder, path, flags, mode))

#define STREAM(name)                                                        \
    FILE *name(const char *path, const char *mode)                          \
    {                                                                       \
        if (strpbrk(mode, "wa+") && change("open", path, 1) == FAIL)        \
            return NULL;                                                    \
        return NEXT(name)(path, mode);                                      \
    }
STREAM(fopen)
STREAM(fopen64)

/* A call that writes `half` bytes when it is torn. Streams of the terminal are no files of the folder. */
#define WRITE(name, parameters, file, whole, half)                                                  \
    ssize_t name parameters                                                                         \
    {                                                                                               \
        int fate = shared && (file) > 2 ? change("write", path_of(file), 1) : PROCEED;              \
        if (fate == FAIL)                                                                           \
            return -1;                                                                              \
        if (fate == TEAR) {                                                                         \
            (void)!NEXT(name) half;                                                                 \
            DIE();                                                                                  \
        }                                                                                           \
        return NEXT(name) whole;                                                                    \
    }
WRITE(write, (int file, const void *bytes, size_t n), file, (file, bytes, n), (file, bytes, n / 2))
WRITE(pwrite, (int file, const void *bytes, size_t n, off_t o), file, (file, bytes, n, o), (file, bytes, n / 2, o))
WRITE(pwrite64, (int file, const void *bytes, size_t n, off_t o), file, (file, bytes, n, o), (file, bytes, n / 2, o))
WRITE(writev, (int file, const struct iovec *parts, int n), file, (file, parts, n), (file, parts, n / 2))
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off_t *, size_t);
WRITE(sendfile, (int file, int source, off_t *o, size_t n), file, (file, source, o, n), (file, source, o, n / 2))
WRITE(sendfile64, (int file, int source, off_t *o, size_t n), file, (file, source, o, n), (file, source, o, n / 2))
WRITE(copy_file_range, (int source, off_t *i, int file, off_t *o, size_t n, unsigned flags), file,
      (source, i, file, o, n, flags), (source, i, file, o, n / 2, flags))

#define CHANGE(name, parameters, path, writes, arguments) \
    int name parameters                                   \
    {                                                     \
        if (change(#name, path, writes) == FAIL)          \
            return -1;                                    \
        return NEXT(name) arguments;                      \
    }
CHANGE(rename, (const char *a, const char *b), b, 0, (a, b))
CHANGE(renameat, (int f, const char *a, int g, const char *b), b, 0, (f, a, g, b))
CHANGE(link, (const char *a, const char *b), b, 1, (a, b))
CHANGE(linkat, (int f, const char *a, int g, const char *b, int flags), b, 1, (f, a, g, b, flags))
CHANGE(symlink, (const char *a, const char *b), b, 1, (a, b))
CHANGE(unlink, (const char *a), a, 0, (a))
CHANGE(unlinkat, (int f, const char *a, int flags), a[0] == '/' || f < 0 ? a : path_of(f), 0, (f, a, flags))
CHANGE(mkdir, (const char *a, mode_t mode), a, 1, (a, mode))
CHANGE(mkdirat, (int f, const char *a, mode_t mode), a, 1, (f, a, mode))
CHANGE(rmdir, (const char *a), a, 0, (a))
CHANGE(fsync, (int file), shared ? path_of(file) : NULL, 1, (file))
CHANGE(fdatasync, (int file), shared ? path_of(file) : NULL, 1, (file))
CHANGE(ftruncate, (int file, off_t n), shared ? path_of(file) : NULL, 0, (file, n))
CHANGE(ftruncate64, (int file, off_t n), shared ? path_of(file) : NULL, 0, (file, n))

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int code = NEXT(clock_gettime)(clock, now);

    if (!code && clock == CLOCK_REALTIME && shared && at && shared->count >= at && !strcmp(kind, "clock"))
        now->tv_sec -= DAY;
    return code;
}
