"""Who holds which page of the KV cache, and which full pages can be shared by prefixes.

A full page is known by a keyed hash of all tokens up to its end, so a page found by its hash holds exactly the keys and
values that the prefix needs. A page that nobody holds any more keeps its content until it is the least recently used one
when a page is needed.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

from .executor import PAGE_SIZE


class PrefixHash:
    """Chained hashes of full pages; the key makes collisions that a client could craft as unlikely as chance."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def extend(self, hashes: list[bytes], tokens: Sequence[int]) -> None:
        """Append the hashes of those full pages of `tokens` that `hashes` lacks."""
        for page in range(len(hashes), len(tokens) // PAGE_SIZE):
            ids = array("q", tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]).tobytes()
            previous = hashes[-1] if hashes else b""
            hashes.append(hashlib.blake2b(previous + ids, digest_size=16, key=self._key).digest())


class Pages:
    """Reference counts, hashes and the order in which unused pages are taken."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = deque(range(num_pages))  # unused, nothing worth keeping
        self._unused: OrderedDict[int, None] = OrderedDict()  # unused but findable, least recently used first

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._blank) + len(self._unused)

    @property
    def num_findable(self) -> int:
        """Pages that a prefix may find."""
        return len(self._page_of)

    def take(self, count: int) -> list[int] | None:
        """`count` pages to write to, or None when there are not so many."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.popleft()
            else:
                page, _ = self._unused.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            taken.append(page)
        return taken

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, now held once more each."""
        found = []
        for key in hashes:
            page = self._page_of.get(key)
            if page is None:
                break
            self._unused.pop(page, None)
            self._references[page] += 1
            found.append(page)
        return found

    def publish(self, page: int, key: bytes) -> None:
        """Make a full page findable, unless another page with this content is."""
        if self._hash_of[page] is None and key not in self._page_of:
            self._hash_of[page] = key
            self._page_of[key] = page

    def release(self, pages: Sequence[int], keep: bool = True) -> None:
        """Give up one hold on each; without `keep` their content is forgotten."""
        for page in reversed(pages):  # a prefix outlives what comes after it
            self._references[page] -= 1
            assert self._references[page] >= 0
            if not keep:
                self._forget(page)
            if self._references[page]:
                continue
            if self._hash_of[page] is None:
                self._blank.append(page)
            else:
                self._unused[page] = None

    def _forget(self, page: int) -> None:
        key = self._hash_of[page]
        if key is not None:
            del self._page_of[key]
            self._hash_of[page] = None
