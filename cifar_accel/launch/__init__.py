"""How trainings are started on this machine: the command, the child process, studies."""
