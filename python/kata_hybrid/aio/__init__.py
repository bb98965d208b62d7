"""What asyncio lacks here: supervised tasks, child processes with a reaper, native completions."""
