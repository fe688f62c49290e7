"""Kernels of several GPUs of one host, over memory that they share. Start at push.py."""
