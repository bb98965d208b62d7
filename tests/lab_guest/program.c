/* The test guest's own program, static, for the initrd:
 *
 *   serve SHELL...          first process: runs each script that the host sends to port 1
 *   echo PORT               sends back what comes; at the end of it, adds its checksum
 *   dial PORT COUNT BYTES   COUNT streams to the host at once, which does what "echo" does
 *   hold PORT               connects to the host and says how the connection ends
 *   bulk PORT               takes all that comes and answers a byte; 64 MiB if nothing comes
 *
 * A script comes as all the bytes of one direction; back go its output and a last line,
 * "status N". Streams are AF_VSOCK ones. Both ends half-close: who sends is done before who answers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum { COMMAND_PORT = 1, BACKLOG = 1024, BUFFER_BYTES = 16384, SCRIPT_BYTES = 65536 };
enum { TRAILER_BYTES = 9, WAIT_EVENTS = 64 };

static void die(const char *format, ...)
{
    int error = errno;
    va_list arguments;

    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf(": %s\n", strerror(error));
    exit(1);
}

static uint32_t crc_table[256];

/* CRC-32 as zlib has it. */
static void make_crc_table(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xedb88320 : value >> 1;
        crc_table[byte] = value;
    }
}

static uint32_t crc32(uint32_t crc, const unsigned char *data, size_t length)
{
    crc = ~crc;
    for (size_t at = 0; at < length; at++)
        crc = crc_table[(crc ^ data[at]) & 255] ^ crc >> 8;
    return ~crc;
}

static void allow_many_descriptors(void)
{
    struct rlimit limit = {8192, 8192};

    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        die("allow many descriptors");
}

static int new_socket(int flags)
{
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);

    if (fd < 0)
        die("socket");
    return fd;
}

static struct sockaddr_vm address_of(unsigned cid, unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    return address;
}

static int listen_on(unsigned port, int flags)
{
    struct sockaddr_vm address = address_of(VMADDR_CID_ANY, port);
    int fd = new_socket(flags);

    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, BACKLOG) != 0)
        die("listen on port %u", port);
    return fd;
}

static void watch(int epoll, int operation, int fd, uint32_t events, void *owner)
{
    struct epoll_event event = {.events = events, .data.ptr = owner};

    if (epoll_ctl(epoll, operation, fd, &event) != 0)
        die("watch a descriptor");
}

/* serve ---------------------------------------------------------------------------------------- */

static void run_script(int connection, char **shell)
{
    static char script[SCRIPT_BYTES + 1];
    char *command[8] = {0};
    size_t length = 0;
    ssize_t count;
    int words = 0, status, null;

    while ((count = read(connection, script + length, SCRIPT_BYTES - length)) > 0)
        length += (size_t)count;
    if (count < 0 || length == SCRIPT_BYTES)
        return;
    while (shell[words] && words < 6) {
        command[words] = shell[words];
        words++;
    }
    command[words] = script;
    signal(SIGCHLD, SIG_DFL);
    pid_t child = fork();
    if (child == 0) {
        setsid();
        null = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (dup2(null, 0) < 0 || dup2(connection, 1) < 0 || dup2(connection, 2) < 0)
            _exit(126);
        execv(command[0], command);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        return;
    status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    dprintf(connection, "\nstatus %d\n", status);
    /* Not just a close: something in the background may still have it. */
    shutdown(connection, SHUT_RDWR);
}

static _Noreturn void serve(char **shell)
{
    int listener = listen_on(COMMAND_PORT, 0);

    /* Of orphans as well: nobody asks for their status. */
    signal(SIGCHLD, SIG_IGN);
    printf("test guest: ready\n");
    fflush(stdout);
    for (;;) {
        int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (connection < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            die("accept a command");
        }
        pid_t child = fork();
        if (child == 0) {
            close(listener);
            run_script(connection, shell);
            _exit(0);
        }
        close(connection);
    }
}

/* echo ----------------------------------------------------------------------------------------- */

struct echoed {
    int fd;
    uint32_t crc;
    size_t length, sent;
    int is_ended;
    unsigned char buffer[BUFFER_BYTES];
};

/* One step; 0 when the stream is over. */
static int advance_echo(int epoll, struct echoed *stream)
{
    for (;;) {
        while (stream->sent < stream->length) {
            ssize_t count = send(stream->fd, stream->buffer + stream->sent,
                                 stream->length - stream->sent, MSG_NOSIGNAL);
            if (count < 0 && errno == EAGAIN) {
                watch(epoll, EPOLL_CTL_MOD, stream->fd, EPOLLOUT, stream);
                return 1;
            }
            if (count < 0)
                return 0;
            stream->sent += (size_t)count;
        }
        if (stream->is_ended)
            return 0;
        ssize_t count = read(stream->fd, stream->buffer, sizeof stream->buffer);
        if (count < 0 && errno == EAGAIN) {
            watch(epoll, EPOLL_CTL_MOD, stream->fd, EPOLLIN, stream);
            return 1;
        }
        if (count < 0)
            return 0;
        stream->sent = 0;
        stream->length = (size_t)count;
        stream->crc = crc32(stream->crc, stream->buffer, stream->length);
        if (count == 0) {
            stream->is_ended = 1;
            stream->length = TRAILER_BYTES;
            snprintf((char *)stream->buffer, sizeof stream->buffer, "%08x\n", stream->crc);
        }
    }
}

static _Noreturn void echo(unsigned port)
{
    int listener = listen_on(port, SOCK_NONBLOCK);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[WAIT_EVENTS];

    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, NULL);
    printf("echo on %u\n", port);
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(epoll, events, WAIT_EVENTS, -1);
        for (int at = 0; at < count; at++) {
            struct echoed *stream = events[at].data.ptr;
            if (stream) {
                if (!advance_echo(epoll, stream)) {
                    close(stream->fd);
                    free(stream);
                }
                continue;
            }
            int fd;
            while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0) {
                stream = calloc(1, sizeof *stream);
                if (!stream)
                    die("remember a stream");
                stream->fd = fd;
                watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, stream);
            }
        }
    }
}

/* dial ----------------------------------------------------------------------------------------- */

/* Bytes that anybody can make again: xorshift64, one byte a step. */
static void fill(uint64_t *state, unsigned char *data, size_t length)
{
    for (size_t at = 0; at < length; at++) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        data[at] = (unsigned char)*state;
    }
}

struct dialled {
    int fd, is_connected, is_good;
    uint64_t made, checked;
    size_t produced, pending, sent, received, trailer;
    uint32_t crc;
    unsigned char buffer[4096];
    char text[TRAILER_BYTES + 1];
};

/* One step; 0 when the stream is over, "is_good" tells how. */
static int advance_dial(int epoll, struct dialled *stream, size_t bytes)
{
    unsigned char got[4096], wanted[4096];
    int error = 0, is_blocked = 0;
    socklen_t size = sizeof error;

    if (!stream->is_connected) {
        getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error)
            return 0;
        stream->is_connected = 1;
    }
    while (!is_blocked && stream->sent < bytes) {
        if (stream->pending == 0) {
            stream->pending = bytes - stream->produced;
            if (stream->pending > sizeof stream->buffer)
                stream->pending = sizeof stream->buffer;
            fill(&stream->made, stream->buffer, stream->pending);
            stream->crc = crc32(stream->crc, stream->buffer, stream->pending);
            stream->produced += stream->pending;
        }
        size_t offset = (stream->produced - stream->pending) % sizeof stream->buffer;
        ssize_t count = send(stream->fd, stream->buffer + offset, stream->pending, MSG_NOSIGNAL);
        if (count < 0 && errno != EAGAIN)
            return 0;
        if (count < 0) {
            is_blocked = 1;
        } else {
            stream->pending -= (size_t)count;
            stream->sent += (size_t)count;
            if (stream->sent == bytes)
                shutdown(stream->fd, SHUT_WR);
        }
    }
    for (;;) {
        ssize_t count = read(stream->fd, got, sizeof got);
        if (count < 0 && errno == EAGAIN)
            break;
        if (count <= 0) {
            snprintf((char *)wanted, sizeof wanted, "%08x\n", stream->crc);
            stream->is_good = count == 0 && stream->received == bytes &&
                              strcmp(stream->text, (char *)wanted) == 0;
            return 0;
        }
        size_t body = bytes - stream->received;
        if (body > (size_t)count)
            body = (size_t)count;
        fill(&stream->checked, wanted, body);
        if (memcmp(got, wanted, body) != 0)
            return 0;
        stream->received += body;
        for (size_t at = body; at < (size_t)count; at++) {
            if (stream->trailer == TRAILER_BYTES)
                return 0;
            stream->text[stream->trailer++] = (char)got[at];
        }
    }
    watch(epoll, EPOLL_CTL_MOD, stream->fd, is_blocked ? EPOLLIN | EPOLLOUT : EPOLLIN, stream);
    return 1;
}

static int dial(unsigned port, size_t streams, size_t bytes)
{
    struct sockaddr_vm address = address_of(VMADDR_CID_HOST, port);
    struct dialled *all = calloc(streams, sizeof *all);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event events[WAIT_EVENTS];
    size_t left = streams, good = 0;

    if (!all)
        die("remember the streams");
    for (size_t at = 0; at < streams; at++) {
        struct dialled *stream = &all[at];
        stream->made = stream->checked = at + 1;
        stream->fd = new_socket(SOCK_NONBLOCK);
        if (connect(stream->fd, (struct sockaddr *)&address, sizeof address) != 0 &&
            errno != EINPROGRESS)
            die("connect stream %zu", at);
        watch(epoll, EPOLL_CTL_ADD, stream->fd, EPOLLOUT, stream);
    }
    while (left > 0) {
        int count = epoll_wait(epoll, events, WAIT_EVENTS, -1);
        for (int at = 0; at < count; at++) {
            struct dialled *stream = events[at].data.ptr;
            if (!advance_dial(epoll, stream, bytes)) {
                good += (size_t)stream->is_good;
                close(stream->fd);
                left--;
            }
        }
    }
    printf("streams %zu good %zu\n", streams, good);
    return good == streams ? 0 : 1;
}

/* hold ----------------------------------------------------------------------------------------- */

static int hold(unsigned port)
{
    struct sockaddr_vm address = address_of(VMADDR_CID_HOST, port);
    int fd = new_socket(0);
    char byte;

    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        die("connect");
    printf("held\n");
    fflush(stdout);
    ssize_t count = read(fd, &byte, 1);
    if (count < 0)
        die("ended");
    printf("ended: %s\n", count == 0 ? "end of stream" : "data");
    return 0;
}

/* bulk ----------------------------------------------------------------------------------------- */

/* For benchmarks: nothing is done to the bytes, one stream after the other. */
static _Noreturn void bulk(unsigned port)
{
    enum { CHUNK_BYTES = 1 << 20, ANSWER_BYTES = 64 << 20 };
    static unsigned char buffer[CHUNK_BYTES];
    int listener = listen_on(port, 0);

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            die("accept a stream");
        size_t received = 0, left;
        ssize_t count;
        while ((count = read(fd, buffer, sizeof buffer)) > 0)
            received += (size_t)count;
        left = received ? 1 : ANSWER_BYTES;
        while (left > 0) {
            count = send(fd, buffer, left < sizeof buffer ? left : sizeof buffer, MSG_NOSIGNAL);
            if (count <= 0)
                break;
            left -= (size_t)count;
        }
        close(fd);
    }
}

int main(int count, char **words)
{
    const char *role = count > 1 ? words[1] : "";

    signal(SIGPIPE, SIG_IGN);
    make_crc_table();
    if (count > 2 && strcmp(role, "serve") == 0)
        serve(words + 2);
    allow_many_descriptors();
    if (count == 3 && strcmp(role, "echo") == 0)
        echo((unsigned)atoi(words[2]));
    if (count == 5 && strcmp(role, "dial") == 0)
        return dial((unsigned)atoi(words[2]), (size_t)atol(words[3]), (size_t)atol(words[4]));
    if (count == 3 && strcmp(role, "hold") == 0)
        return hold((unsigned)atoi(words[2]));
    if (count == 3 && strcmp(role, "bulk") == 0)
        bulk((unsigned)atoi(words[2]));
    printf("usage: serve SHELL... | echo PORT | dial PORT COUNT BYTES | hold PORT | bulk PORT\n");
    return 2;
}
