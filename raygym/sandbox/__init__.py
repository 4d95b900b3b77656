"""Runs a Python program that nobody has read, such as a policy's, in a process of its own under limits.

`run.run_program` starts a supervisor (`supervisor.py`, trusted), which forks the jail (`jail.py`) in which the program
runs (`program.py`). What holds the program, from the strongest to the weakest:

- *Namespaces*, where the kernel permits them (to root with CAP_SYS_ADMIN, to everyone where user namespaces are on):
  the program sees no network, no process but its own, and a file system that holds Python's library, shared libraries
  and an empty /tmp of limited size; all but /tmp is read-only. Its processes die with the first of them. Where the
  kernel permits none, a warning is logged once and the rest stays.
- *Another user*: started by root, the program runs as `nobody` (65534). It never keeps a capability.
- *Limits of the kernel*: CPU seconds, address space, size of a file, open files, no second process or thread, no core
  dumps. The supervisor adds wall time and the amount of output, kills the whole tree, also what made itself a session
  of its own, and removes the directory. It does so too when the process that asked is gone.
- *An audit hook* in the interpreter refuses, with a PermissionError in words, sockets that leave the process, new
  processes, signals to others, ctypes, and files outside of its directory (Python's library may be read).

Environment variables are empty. Not defended: without namespaces only the audit hook stands between the program and
the network or what the user may read, files many in number are not bounded together, and a program that sets out to
get around the hook (through a bug of the interpreter, say) will; use a container or a virtual machine then. There, if
root runs it and `nobody` may not read Python's library, programs can import only the common modules that were loaded
before. With namespaces it is the kernel that is trusted. Programs share the machine's processors and memory with all
others, up to their limits. Linux only.
"""
