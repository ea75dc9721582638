"""A wire between a browser and a server that a test can cut without a word, as when a cable is pulled."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class TcpRelay:
    """Passes bytes between its own port and a server's, until it falls silent: then nothing passes, nothing closes.

    Attributes:
        port: Its own.
        is_silent: New connections are accepted and pass nothing.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.is_silent = False
        self._sockets: list[socket.socket] = []
        self._passing = threading.Event()  # Of the connections so far.
        self._passing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """Stop what passes on the connections so far; those that come later are as `is_silent` says."""
        self._passing.clear()
        self._passing = threading.Event()
        self._passing.set()

    def close(self) -> None:
        """Close everything."""
        for each in [self._listener, *self._sockets]:
            # What waits for it in a thread ends.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            if self.is_silent:
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._sockets.append(server)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(*pair, self._passing), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket, passing: threading.Event) -> None:
        try:
            while data := source.recv(65536):
                if not passing.is_set():
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


@contextlib.contextmanager
def tcp_relay(server_port: int) -> Iterator[TcpRelay]:
    """Run a relay until the body is done."""
    relay = TcpRelay(server_port)
    try:
        yield relay
    finally:
        relay.close()
