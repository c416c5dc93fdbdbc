"""The report that a comparison leaves: a page, a text and figures."""
