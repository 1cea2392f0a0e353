"""What is asked of an engine one thing at a time, where nothing but the answer matters: the openai package's client.

Load is made by `engines.load`, which is far lighter per chunk. A single answer recorded from `blocks` is stamped by the
same clock, as its bytes are read.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

from engines.base import EngineError, Request, SpeculationCounters
from engines.openai_stream import ERROR_CHARACTERS, Endpoint, without_key

if TYPE_CHECKING:
    import httpx2
    import openai

SILENCE_LIMIT_SECONDS = 600.0  # a long prefill sends nothing for minutes
CONNECT_LIMIT_SECONDS = 10.0


def http_client(address: str, timeout: httpx2.Timeout) -> httpx2.AsyncClient:
    """A client that takes no proxy and follows nobody elsewhere. `address`: the IP address that it connects to whatever
    the URL's name leads to; the name is still what the certificate must say. Empty: as the name says."""
    import httpx2  # here: loading it and openai takes half a second, which not every run needs

    class Fixed(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            if address:
                request.extensions = {**request.extensions, "sni_hostname": request.url.host}
                request.url = request.url.copy_with(host=address)
            return await super().handle_async_request(request)

    trusted = ssl.create_default_context()  # as the load generator trusts, and not what a package brings along
    # A proxy between us and a server on this machine would be in the way.
    return httpx2.AsyncClient(timeout=timeout, trust_env=False, transport=Fixed(verify=trusted, trust_env=False))


class EngineClient:
    """`async with EngineClient(endpoint) as client`. Raises EngineError for whatever goes wrong."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._made: openai.AsyncOpenAI | None = None

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._made:
            await self._made.close()

    @property
    def _client(self) -> openai.AsyncOpenAI:
        if self._made is None:
            import httpx2
            import openai

            timeout = httpx2.Timeout(SILENCE_LIMIT_SECONDS, connect=CONNECT_LIMIT_SECONDS)
            self._made = openai.AsyncOpenAI(
                base_url=f"{self.endpoint.base_url}/v1",
                api_key=self.endpoint.key or "none",
                max_retries=0,  # a second attempt would hide the first one's failure
                timeout=timeout,
                http_client=http_client(self.endpoint.address, timeout),
            )
        return self._made

    async def models(self) -> list[str]:
        """The ids of the models that it serves."""
        with self._failures_told("/v1/models"):
            return [model.id async for model in self._client.models.list()]

    async def blocks(self, request: Request) -> AsyncGenerator[bytes, None]:
        """One answer's bytes, as they are read."""
        body = self.endpoint.body(request)
        with self._failures_told("the request"):
            streaming = self._client.chat.completions.with_streaming_response.create(
                model=body.pop("model"), messages=body.pop("messages"), stream=body.pop("stream"), extra_body=body
            )
            async with streaming as response:
                async for block in response.iter_bytes():
                    yield block

    async def counters(self) -> SpeculationCounters | None:
        """What the engine has counted since it started; None where it has no such counters."""
        read = self.endpoint.engine.read_counters
        if read is None:
            return None
        with self._failures_told("/metrics"):
            return read(await self._client.get(f"{self.endpoint.base_url}/metrics", cast_to=str))

    async def empty_caches(self) -> bool:
        """Make the engine forget every cached prefix; False where it keeps none."""
        path = self.endpoint.engine.empty_caches_path
        if path:
            with self._failures_told(path):
                await self._client.post(f"{self.endpoint.base_url}{path}", cast_to=str)
        return bool(path)

    @contextlib.contextmanager
    def _failures_told(self, what: str) -> Iterator[None]:
        import httpx2
        import openai

        label = self.endpoint.engine.label
        try:
            yield
        except openai.APIStatusError as failure:
            said = without_key(failure.response.text, self.endpoint.key)[:ERROR_CHARACTERS]
            raise EngineError(f"{label} refused {what} with HTTP {failure.status_code}: {said}") from failure
        # The package's time-outs are connection errors too, so they come first.
        except (openai.APITimeoutError, httpx2.ReadTimeout) as failure:
            if isinstance(failure.__cause__, httpx2.ConnectTimeout):
                raise EngineError(f"{label} cannot be reached at {self.endpoint.base_url}.") from failure
            raise EngineError(f"{label} sent nothing for {SILENCE_LIMIT_SECONDS:g} s.") from failure
        except openai.APIConnectionError as failure:
            if isinstance(failure.__cause__, httpx2.ConnectError):
                raise EngineError(f"{label} cannot be reached at {self.endpoint.base_url}.") from failure
            said = without_key(str(failure.__cause__ or failure), self.endpoint.key)
            raise EngineError(f"{label} broke off the answer: {said}.") from failure
        except httpx2.HTTPError as failure:
            said = without_key(str(failure), self.endpoint.key)
            raise EngineError(f"{label} broke off the answer: {said or type(failure).__name__}.") from failure
