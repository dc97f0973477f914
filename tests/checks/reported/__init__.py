"""What public reports, outside tests and peers' suites found, as tests of what a user expects.

`test_reports.py` has 20 inputs after public bug reports of people who do this job, `test_faults.py`
those of two rounds of hostile tests, `test_peers.py` what other libraries' suites said. Numbers are
those of the reports.
"""
