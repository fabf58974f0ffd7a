"""`hipp report`: one self-contained HTML page about evaluated models, and PNG figures."""

from hipp_ext.evals.report.table import table_rows
from hipp_ext.evals.report.write import write_report

__all__ = ["table_rows", "write_report"]
