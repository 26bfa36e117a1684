"""What a network policy lets through: names before they are resolved, addresses before they are connected to.

A name that is not on the list is never resolved, so that questions to name servers carry nothing out. What a name
resolved to is judged by itself: a private, link-local or metadata address, or one of this host, is refused unless the
list names that very address, whatever name led to it.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from abyssal.sandbox.api import Allowed, Network
from abyssal.sandbox.errors import BadRequest, Unsupported

Address = IPv4Address | IPv6Address
# public by their numbers, and yet a cloud's own: Azure's agent
METADATA = frozenset({IPv4Address("168.63.129.16")})
_TRANSLATED = IPv6Network("64:ff9b::/96")  # an IPv4 address in its last bits
_PUBLIC_6 = IPv6Network("2000::/3")
# not public, whatever the release of Python takes them for: a cloud's metadata among them, relays, documentation
_SPECIAL = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")))
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


def check_policy(network: Network) -> None:
    """Insist that a policy can be enforced.

    Raises:
        BadRequest: an entry is no domain, address or network, or its port is none.
        Unsupported: an entry asks for another protocol than TCP.
    """
    for entry in network.allow:
        if entry.protocol == "udp":
            raise Unsupported(f"{entry.host} over UDP cannot be allowed: connections go through a proxy, for TCP alone")
        if entry.protocol != "tcp":
            raise BadRequest(f"protocol {entry.protocol!r} is unknown: tcp is possible")
        if isinstance(entry.port, bool) or not isinstance(entry.port, int) or not 0 <= entry.port <= 65535:
            raise BadRequest(f"{entry.port!r} is no port from 1 to 65535, nor 0 for any")
        if not isinstance(entry.host, str) or not (_is_network(entry.host) or is_name(_plain(entry.host))):
            raise BadRequest(f"{entry.host!r} is no domain, '*.' and a domain, address or network")


def is_name(text: str) -> bool:
    """Whether this is a domain name in lower case, not an address in any spelling that resolvers take for one."""
    labels = text.split(".")
    numeric = labels[-1].isdigit() or labels[-1].startswith("0x")
    return len(text) < 254 and not numeric and all(_LABEL.fullmatch(label) for label in labels)


def is_address(text: str) -> bool:
    """Whether this is an address and not a name."""
    return _address(text) is not None


def tidy(host: str) -> str:
    """A host as it is compared: lower case, no dot at the end, no brackets."""
    return host.lower().strip("[]").removesuffix(".")


def refused_target(network: Network, host: str, port: int) -> str:
    """Why nobody may ask for this host and port, or nothing. Nothing is resolved for it.

    Args:
        network: the policy.
        host: as `tidy` gives it.
        port: asked for.
    """
    if network.mode == "none":
        return "this sandbox has no network"
    address = _address(host)
    if address is None and not is_name(host):
        return "this is neither a domain name nor an address"
    if network.mode == "open":
        return ""
    if address is not None:
        return "" if _named(network.allow, address, port) else "the address is not on the list of this port"
    if any(_fits(_plain(entry.host), entry.host.startswith("*."), host) for entry in _of_port(network.allow, port)):
        return ""
    return "the name is not on the list of this port"


def refused_address(network: Network, address: str, port: int) -> str:
    """Why this address may not be connected to, or nothing."""
    found = _address(address.partition("%")[0])
    if found is None:
        return "the name resolved to something that is no address"
    return "" if _named(network.allow, found, port) else not_public(found)


def not_public(address: Address) -> str:
    """Why an address is not somewhere in the public net, or nothing."""
    inner = _inside(address)
    if inner is not None:
        return not_public(inner)
    if address in METADATA or address.is_link_local:
        return "the address is link-local or a cloud's metadata service"
    if address.is_loopback or address.is_unspecified:
        return "the address is this host's loopback"
    special = any(address.version == each.version and address in each for each in _SPECIAL)
    special = special or (isinstance(address, IPv6Address) and address not in _PUBLIC_6)
    if not address.is_global or address.is_multicast or address.is_reserved or special:
        return "the address is private or reserved"
    return "the address is this host's own" if _of_this_host(address) else ""


def _inside(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to."""
    if isinstance(address, IPv4Address):
        return None
    if address in _TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _of_this_host(address: Address) -> bool:
    """Only an address of one's own can be bound; where any can be, all are refused."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((str(address), 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _of_port(allow: Sequence[Allowed], port: int) -> Sequence[Allowed]:
    return [entry for entry in allow if entry.port in (0, port) and entry.protocol == "tcp"]


def _named(allow: Sequence[Allowed], address: Address, port: int) -> bool:
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return any(
        (inner or address) in ip_network(entry.host, strict=False)
        for entry in _of_port(allow, port)
        if _is_network(entry.host)
    )


def _fits(domain: str, below: bool, host: str) -> bool:
    return host.endswith(f".{domain}") if below else host == domain


def _plain(host: str) -> str:
    return tidy(host.removeprefix("*."))


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True
