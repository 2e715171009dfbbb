"""The workloads that ship, each written as an outsider would write one."""
