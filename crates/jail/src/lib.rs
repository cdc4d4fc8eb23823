//! Confines a child process: namespaces, `pivot_root`, capabilities, seccomp, rlimits, cgroup.
