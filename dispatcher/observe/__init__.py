"""What a service tells of itself: metrics, health, and the service manager. Nothing that delivers depends on it.

service.py    all of it joined, a task beside the engine, or beside panel and API alone
pulse.py      a task that beats: how late the loop is, whether reader and recorder move
figures.py    what a scrape is made of, read off the engine in slices
catalogue.py  the metrics: names, units, help, and where each is read
metrics.py    a scrape of them
health.py     alive? ready? from the pulse and the last look at the database (store/observe.py)
server.py     /metrics, /livez and /readyz on a listener of their own
systemd.py    READY=1 and its like
reload.py     what SIGHUP changes
"""
