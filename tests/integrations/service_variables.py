"""Variables that Kubernetes sets in every pod beside a Service called sparsek, and Docker for a linked
container; and some that are only like them. Python and C++ must take them alike."""

from __future__ import annotations

OF_A_SERVICE = {
    # A Service with two named ports.
    "SPARSEK_SERVICE_HOST": "10.0.0.1",
    "SPARSEK_SERVICE_PORT": "8080",
    "SPARSEK_SERVICE_PORT_HTTP": "8080",
    "SPARSEK_SERVICE_PORT_METRICS_V2": "9090",
    "SPARSEK_PORT": "tcp://10.0.0.1:8080",
    "SPARSEK_PORT_8080_TCP": "tcp://10.0.0.1:8080",
    "SPARSEK_PORT_8080_TCP_PROTO": "tcp",
    "SPARSEK_PORT_8080_TCP_PORT": "8080",
    "SPARSEK_PORT_8080_TCP_ADDR": "10.0.0.1",
    "SPARSEK_PORT_53_UDP": "udp://10.0.0.1:53",
    "SPARSEK_PORT_53_UDP_ADDR": "10.0.0.1",
    "SPARSEK_PORT_36412_SCTP_PROTO": "sctp",
    # Services called sparsek-chat and sparsek-7b-v2.
    "SPARSEK_CHAT_SERVICE_HOST": "10.0.0.2",
    "SPARSEK_7B_V2_SERVICE_PORT_HTTP": "80",
    "SPARSEK_7B_V2_PORT_80_TCP_ADDR": "10.0.0.3",
    # Of Docker alone.
    "SPARSEK_NAME": "/web/sparsek",
    "SPARSEK_ENV_PATH": "/usr/bin",
    "SPARSEK_ENV_python_version": "3.13",
}

NOT_OF_A_SERVICE = [
    "SPARSEK_",
    "SPARSEK_TOPK",
    "SPARSEK_SERVICE",
    "SPARSEK_SERVICE_HOSTS",
    "SPARSEK_SERVICE_PORT_",
    "SPARSEK_PORTS",
    "SPARSEK_PORT_HTTP",
    "SPARSEK_PORT_8080",
    "SPARSEK_PORT_8080_TCP_HOST",
    "SPARSEK_PORT__TCP",
    "SPARSEK_PORT_8080_ICMP",
    "SPARSEK_chat_PORT",
    "SPARSEK_ENV_",
]
