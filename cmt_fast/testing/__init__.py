"""How numbers are checked and times are measured: used by the tests, the benchmarks and the command line."""
