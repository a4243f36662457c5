"""What is in an adapter's file, of any format: ranks, sizes, defects, and what adding several does.

`python -m lorax.xray` prints it; `lorax.report` shows it on a page. Files are read one matrix after
the other.
"""
