"""A comparison on disk: a page, the same in Markdown, and every run for machines.

| file | content |
|---|---|
| report.html | the page, which asks for nothing outside itself |
| report.md, figures/ | the same in Markdown, its figures as SVG |
| results.jsonl | an `Outcome` a line, curves and all; numbers that JSON lacks are strings, "nan" |
| results.csv | an `Outcome` a row, with its variant's parameters and its training FLOPs |
"""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from gptjax.compare.document import to_html, to_markdown
from gptjax.compare.results import Answer, Outcome
from gptjax.compare.story import story
from gptjax.config import InputError, from_dict, parse_json
from gptjax.outputs import write_whole
