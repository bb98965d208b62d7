/* /init of the boot benchmark: says that it runs, and waits to be ended. Static; the kernel gives it
 * the console as its output. */
#include <unistd.h>

int main(void)
{
    static const char text[] = "init: here\n";

    if (write(1, text, sizeof text - 1) < 0)
        return 1;
    for (;;)
        pause();
}
