"""A TCP port for a program that is told its number."""

import random
import socket


def free_port() -> int:
    """On which nothing listens now, and which the system gives to nobody who asks for any."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            given = int(file.read().split()[0])
    except OSError:  # not Linux
        given = 49_152
    for port in random.sample(range(10_000, max(given, 10_100)), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"none of 100 ports between 10000 and {given} is free")
