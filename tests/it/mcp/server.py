"""An MCP server made with the official Python SDK that does what is hard to live with. Over stdio, or with a port over HTTP."""

import os
import sys
import time

from mcp.server.mcpserver import Context, MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("trouble")
calls = 0


@server.tool()
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool()
def environment() -> str:
    """Names its environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def flood(count: int) -> str:
    """Says much."""
    return "x" * count


@server.tool()
def linger(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "done"


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def look(place: str, closely: bool) -> str:
    """Says how often it was called."""
    return f"{place}: {count()}"


stumbled = False


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def stumble() -> str:
    """Fails the first time."""
    global stumbled
    if not stumbled:
        stumbled = True
        raise ValueError("not yet")
    return str(count())


@server.tool(annotations=ToolAnnotations(readOnlyHint=False, idempotentHint=True))
def touch() -> str:
    """Has an effect."""
    return str(count())


def count() -> int:
    global calls
    calls += 1
    return calls


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def process() -> str:
    """Its process id."""
    return str(os.getpid())


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("on purpose")


@server.tool()
async def grow(ctx: Context) -> str:
    """Gets one more tool, and says so a hundred times."""
    server.add_tool(add, name="grown")
    for _ in range(100):
        await ctx.session.send_tool_list_changed()
    return "grown"


if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run("stdio")
