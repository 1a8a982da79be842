"""Kernels for CPUs: C++ with AVX-512 (VNNI), AVX2 and portable versions, chosen when run."""
