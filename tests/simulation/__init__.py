"""The real engine on the in-memory twins and on virtual time, driven by one seed: faults, then heal, and everything must settle.

    python -m tests.simulation --seeds 10000    a night
    python -m tests.simulation --seed 4711      one run, with its trace

`loop` is time, `plan` what a seed draws, `process` one dispatcher, `network` the receivers, `people` who writes to the database,
`disasters` what goes wrong, `checks` what must hold at every step, `world` joins them, `faults` breaks a rule of the engine on purpose.
"""
