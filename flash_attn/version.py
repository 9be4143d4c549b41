"""The one statement of the version.

The public part is the API level that other packages gate on; the local part is this project's own.
"""

__version__ = "2.8.3+0.1.0"
