/* /init of the boot benchmarks: loads the initrd's modules if there are any, says that it runs, and
 * then, with vsock among them, sends back what comes to a port. Static; the kernel gives it the
 * console as its output. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

enum { ECHO_PORT = 7000 };

static void load_modules(void)
{
    char path[512];
    FILE *list = fopen("/etc/kata-hybrid/modules", "re");

    while (list && fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = 0;
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file >= 0)
            syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
    if (list)
        fclose(list);
}

int main(void)
{
    static const char text[] = "init: here\n";
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = ECHO_PORT};

    load_modules();
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int is_echo = listener >= 0 &&
                  bind(listener, (struct sockaddr *)&address, sizeof address) == 0 &&
                  listen(listener, 8) == 0;
    if (write(1, text, sizeof text - 1) < 0)
        return 1;
    while (!is_echo)
        pause();
    for (;;) {
        char data[64];
        ssize_t count;
        int stream = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        while ((count = read(stream, data, sizeof data)) > 0)
            if (send(stream, data, (size_t)count, MSG_NOSIGNAL) != count)
                break;
        close(stream);
    }
}
