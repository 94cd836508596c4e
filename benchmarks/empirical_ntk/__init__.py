"""The empirical NTK of `ntk` against its peers and against the floor that matrix products set: `make bench`.

tasks.py        what is computed: seven tasks by name
networks.py     their networks in torch
problem.py      a task made concrete: inputs, weights and reference as arrays
oracle.py       where these come from: the kernel by brute force in float64
contenders/     who computes it: one file per library
worker.py       one contender on one task, in a process of its own
rounds.py       contenders take turns, each beside a run of ours
floor.py        operations that a task needs
report.py       measurements in, goals and Markdown out
peers.txt       what `make bench` installs for the peers
"""
