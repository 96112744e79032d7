"""This package runs one engine on two hosts, which are network namespaces of this machine."""
