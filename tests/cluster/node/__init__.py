"""A Kubernetes node of one machine, for tests where no image registry can be reached.

Everything is built from Go modules and Debian packages: see README.md in this folder. Where Docker and
kind exist, kind is the better way.
"""
