/* /init of a test guest: loads the modules of the initrd, mounts the shared folder, waits for
   "late/file" to appear in it, prints what it holds, and powers off. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void load_modules(void)
{
    char path[256];
    FILE *list = fopen("/etc/kata-hybrid/modules", "r");

    while (list && fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = 0;
        int fd = open(path, O_RDONLY);
        if (syscall(SYS_finit_module, fd, "", 0) != 0)
            printf("module %s: %s\n", path, strerror(errno));
        close(fd);
    }
}

int main(void)
{
    char text[100] = "";

    setvbuf(stdout, NULL, _IOLBF, 0);
    load_modules();
    mkdir("/mnt", 0755);
    if (mount("kataShared", "/mnt", "virtiofs", MS_NODEV, "") != 0)
        printf("mount: %s\n", strerror(errno));
    printf("mounted\n");
    for (int attempt = 0; attempt < 400; attempt++) {
        int fd = open("/mnt/late/file", O_RDONLY);
        if (fd >= 0) {
            if (read(fd, text, sizeof text - 1) >= 0)
                printf("found: %s\n", text);
            break;
        }
        usleep(50000);
    }
    int fd = open("/mnt/from-guest", O_WRONLY | O_CREAT, 0644);
    if (fd < 0 || write(fd, "guest", 5) != 5 || close(fd) != 0)
        printf("write: %s\n", strerror(errno));
    reboot(RB_POWER_OFF);
}
