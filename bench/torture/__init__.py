"""Torture: the real dispatcher between a real PostgreSQL and real receivers, each a process of its own, while things break on a seeded schedule.

    producers ──▶ PostgreSQL ◀── network ◀── dispatcher a ──▶ receivers
     (files)          ▲                      dispatcher b        (files)
                      └── PgBouncer ◀─ network ◀──┘

Producers write down the fate of every event, receivers every arrival before they answer it. What the two say is the account; the database is
asked only for what it alone knows: dead letters, and what retention has counted as expired.

    plant.py      the processes, kept running as a service manager would
    faults.py     what breaks, and for how long
    ledger.py     the producers' and receivers' files, and the account
    producer.py, receiver.py   two of the processes
"""
