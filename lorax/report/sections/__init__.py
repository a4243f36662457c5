"""The sections of pages: tables in, `lorax.report.page.Section` out."""
