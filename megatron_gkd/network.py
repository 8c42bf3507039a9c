"""Which network card reaches the first machine: gloo and NCCL would take the one that the machine's
own name stands for, which may be 127.0.0.1.
"""

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def resolve(address: str, port: int) -> str:
    """The IPv4 address that this machine knows as `address`. Raises OSError."""
    found = socket.getaddrinfo(address, port, socket.AF_INET, socket.SOCK_STREAM)
    return str(found[0][4][0])


def is_loopback(ip: str) -> bool:
    """Whether the address is of every machine itself."""
    return ip.startswith("127.")


def own_address(towards: str, port: int) -> str:
    """The address from which this machine would send to the address `towards`; nothing is sent.
    Raises OSError where there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return str(probe.getsockname()[0])


def interface_of(ip: str) -> str | None:
    """The name of the interface that has this address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None
