"""Reports: several results on one page, and their key numbers in a table."""

from hesscope.report.html import write_report
from hesscope.report.section import Section, section
from hesscope.report.table import key_number_table, key_numbers

__all__ = ["Section", "key_number_table", "key_numbers", "section", "write_report"]
