/**
 * The tests of server.ts, client.ts and client.html.
 *
 *     bun test                         runs all of them
 *     bun test -t "slow reader"        runs those whose name contains these words
 *
 * Everything goes over real sockets, on ports that the system picks. A test of the room runs the
 * server in this process and talks to it with bare sockets (`Peer`). A test of a program starts that
 * program, in a pipe (`inPipe`) or in a pseudo-terminal (`inTerminal`), and the server of a client is
 * a foreign one (`budgetChat`), so that the client does not rest on ours. A test of the page opens it
 * in a real browser (`Page`), and is skipped where there is none.
 *
 * A test does not sleep but awaits what must come, and fails by its deadline when it does not come.
 * Where minutes must pass, they pass at once, by `jest.useFakeTimers()`. Tests of programs run at the
 * same time, in groups (`describe.concurrent`), because a program takes a while to start.
 *
 * Contents:
 *   1. An example
 *   2. Helpers: waiting, rooms, peers, programs, a foreign server, a proxy, a screen, certificates,
 *      histories, a browser, registered names
 *   3. Text and names
 *   4. The room
 *   5. The protocol: joining, messages, framing, commands, leaving
 *   6. Slow, fast and many
 *   7. Budgets and addresses
 *   8. Shutdown
 *   9. The server program
 *  10. The client in a terminal
 *  11. The client in a pipe
 *  12. The client and the history
 *  13. The client and passwords
 *  14. TLS
 *  15. History
 *  16. Registered names
 *  17. Operators
 *  18. Browsers
 *  19. The page in a browser
 *  20. Faults
 */

import { afterAll, afterEach, beforeEach, describe, expect, jest, mock, test } from "bun:test";
import { Database } from "bun:sqlite";
import { once } from "node:events";
import fs from "node:fs";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import type { Socket, TCPSocketListener } from "bun";
import {
  classify,
  cleanText as cleanTextOfClient,
  complete,
  createEditor,
  createFollower,
  createKeyring,
  createOutbox,
  cutRows,
  hidePassword,
  PACE,
  receiveMessages,
  shortenRoster,
  splitLines,
  wrapText,
} from "./client.ts";
import type { Entry } from "./client.ts";
import type { RoomEvent, ServerOptions } from "./server.ts";

// --- 1. An example -----------------------------------------------------------------------------

describe("an example", () => {
  test("what one person says is heard by the others", async () => {
    // A room in this process, on a free port. It is closed after the test.
    const room = open();

    // Two connections. Each has given a name, and has read all that it was told until now.
    const [alice, bob] = await enterAll(room, "alice", "bob");

    // A peer sends bytes, so a line needs its newline.
    alice.send("hello\n");

    // `line` waits for the next line. If none comes, the test fails after a while.
    expect(await bob.line()).toBe("[alice] hello");

    // To show that something is not heard, let something follow that is: lines keep their order.
    bob.send("hi alice\n");
    expect(await alice.line()).toBe("[bob] hi alice");
  });
});

// --- 2. Helpers --------------------------------------------------------------------------------

/** `count` things, made from their numbers. */
function times<T>(count: number, make: (number: number) => T): T[] {
  return Array.from({ length: count }, (_, number) => make(number));
}

/** "user0", "user1" and so on, for names. */
const called = (name: string, count: number) => times(count, (number) => `${name}${number}`);

/** "line 0", "line 1" and so on, as `by` says them. */
const numbered = (count: number, by = "") =>
  times(count, (number) => `${by && `[${by}] `}line ${number}`);

/** Lines as they are sent. */
const toText = (lines: readonly string[]) => lines.map((line) => `${line}\n`).join("");

/** Numbers from 0 up to a limit, the same on every run (mulberry32). */
function randomNumbers(seed: number): (limit: number) => number {
  return (limit) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };
}

/** Rows of a table that stand in a text, several to a line, with semicolons between them. */
const rowsOf = (table: string) => table.trim().split(/;\s+/);

/** What the kernel says about a process, in KiB: VmRSS is its memory now, VmHWM at its highest. */
function memory(pid: number, field: "VmRSS" | "VmHWM"): number {
  const status = fs.readFileSync(`/proc/${pid}/status`, "latin1");
  return Number(status.match(new RegExp(`${field}:\\s+(\\d+) kB`))?.[1] ?? NaN);
}

const cleanups: (() => unknown)[] = []; // run after each test, the last one first
let running = 0; // tests; those of a `describe.concurrent` are cleaned up after together

beforeEach(() => void running++);

afterEach(async () => {
  if (--running > 0) return;
  jest.useRealTimers();
  while (cleanups.length > 0) await cleanups.pop()?.();
});

// --- Waiting

/** Something that changes, and a way to wait for what it should become. */
class Watched {
  private changed = Promise.withResolvers<void>();

  protected change(): void {
    this.changed.resolve();
    this.changed = Promise.withResolvers();
  }

  /** Waits until `check` returns something, and resolves with it. */
  async when<T>(check: () => T | undefined): Promise<T> {
    for (;;) {
      const result = check();
      if (result !== undefined) return result;
      await this.changed.promise;
    }
  }
}

jest.setTimeout(15_000); // ms that a test may take, on a slow machine with others at the same time
const DEADLINE = 14_000; // ms that a test waits for a text: less, so that it can tell what is missing

/** A growing text: the output of a program, or what a server has heard. */
class Transcript extends Watched {
  text = "";
  private seen = 0; // characters before the end of what `until` has found last

  add(more: string): void {
    this.text += more;
    this.change();
  }

  async read(stream: ReadableStream<Uint8Array>): Promise<void> {
    const decoder = new TextDecoder();
    for await (const chunk of stream) this.add(decoder.decode(chunk, { stream: true }));
  }

  /** Waits for some text, behind what was found last. Resolves with the match of a pattern. */
  async until(wanted: string | RegExp): Promise<RegExpExecArray> {
    const pattern = typeof wanted === "string" ? new RegExp(RegExp.escape(wanted)) : wanted;
    const match = await this.soon(
      () => pattern.exec(this.text.slice(this.seen)) ?? undefined,
      () => `no ${pattern} in ${JSON.stringify(this.text.slice(this.seen).slice(-2000))}`,
    );
    this.seen += match.index + match[0].length;
    return match;
  }

  /** Like `when`, but gives up after a while, with an error that says what is missing. */
  async soon<T>(check: () => T | undefined, missing: () => string): Promise<T> {
    const late = Promise.withResolvers<never>();
    const timer = setTimeout(() => late.reject(new Error(missing())), DEADLINE);
    try {
      return await Promise.race([this.when(check), late.promise]);
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Lets the event loop do what it can do while no time passes. */
async function turns(count: number): Promise<void> {
  for (let turn = 0; turn < count; turn++) await new Promise((resolve) => setImmediate(resolve));
}

/** Lets fake time pass, and the event loop run. */
async function pass(seconds: number): Promise<void> {
  for (let tick = 0; tick < seconds * 10; tick++) {
    jest.advanceTimersByTime(100);
    await turns(1);
  }
}

// --- Rooms: the server in this process

/** What the kernel tells of a connection. A test can change it, for what takes a minute otherwise. */
type TcpInfo = (fd: number, info: DataView, result: number) => void;
let tcpInfo: TcpInfo | undefined;
const { dlopen } = await import("bun:ffi");
mock.module("bun:ffi", () => ({
  dlopen(...library: Parameters<typeof dlopen>) {
    type Call = (fd: number, level: number, name: number, info: DataView, size: unknown) => number;
    const { symbols } = dlopen(...library);
    const real = symbols["getsockopt"] as unknown as Call;
    const getsockopt: Call = (fd, level, name, info, size) => {
      const result = real(fd, level, name, info, size);
      tcpInfo?.(fd, info, result);
      return result;
    };
    return { symbols: { ...symbols, getsockopt } };
  },
}));
const { addressKey, apply, cleanText, Room, startServer } = await import("./server.ts");

/** A server in this process. One with TLS tells what to trust, one for browsers how to come in. */
type Server = ReturnType<typeof startServer> & { ca?: string; isWeb?: boolean };

/** Opens a room: without limits on the rate, and any exception in it fails the test. */
function open(options: Partial<ServerOptions> = {}): Server {
  const server = startServer({ port: 0, rate: 0, logError: expect.unreachable, ...options });
  cleanups.push(() => server.stop());
  return server;
}

/** Opens a room with TLS. */
function openTls(options: Partial<ServerOptions> = {}): Server {
  const tls = { cert: Bun.file(certificate.cert), key: Bun.file(certificate.key) };
  return Object.assign(open({ tls, ...options }), { ca: certificate.ca });
}

/** Opens a room whose peers come in by WebSocket, as browsers do. */
function openForBrowsers(options: Partial<ServerOptions> = {}): Server {
  return throughWeb(open({ web: 0, ...options }));
}

/** The same under TLS. */
function openTlsForBrowsers(options: Partial<ServerOptions> = {}): Server {
  return throughWeb(openTls({ web: 0, ...options }));
}

/** The same room, which peers enter by WebSocket from now on. */
function throughWeb(room: Server): Server {
  return Object.assign(room, webOf(room));
}

/** Where browsers come in. */
function webOf(room: Server): Required<Pick<Address, "port" | "isWeb">> {
  return { port: room.webPort ?? NaN, isWeb: true };
}

/** The same for a server that is a program. */
async function webOfProgram({ out }: { out: Transcript }) {
  const [, port] = await out.until(/Browsers: https?:\/\/127\.0\.0\.1:(\d+)\//);
  return { port: Number(port), isWeb: true };
}

const BOTH_WAYS = [
  ["without TLS", open],
  ["with TLS", openTls],
] as const;

const BY_WEBSOCKET = ["by WebSocket", openForBrowsers] as const;
const ALL_WAYS = [
  ...BOTH_WAYS,
  BY_WEBSOCKET,
  ["by WebSocket with TLS", openTlsForBrowsers],
] as const;

/** Opens a room whose log, with each port as PORT, and whose errors a test reads. */
function openLogged(options: Partial<ServerOptions> = {}, openRoom = open) {
  const log: string[] = [];
  const problems: string[] = [];
  const room = openRoom({
    log: (event) => log.push(event.replace(/:\d{4,5}\b/, ":PORT")),
    logError: (problem) => problems.push(problem),
    ...options,
  });
  cleanups.push(() => expect(problems).toHaveLength(0));
  return { room, log, problems };
}

/** The names of those in the room, sorted. */
const namesIn = (server: Server) => server.clients.map(({ name }) => name).toSorted();

/** Bytes that wait in the server for somebody in the room. */
const queued = (server: Server, name: string) =>
  server.clients.find((client) => client.name === name)?.queued ?? NaN;

const WELCOME = "Welcome to bun-chat! What is your name?";
const NAME_RULE = "* A name is 1 to 32 letters and digits.";
const SCRIPT_RULE = "* A name keeps to letters and digits of one script, with few accents.";
const SHUTDOWN = "* The server is shutting down";
const TOO_LONG = "* Your message was longer than 4096 bytes and was not sent.";
const FULL = "* The server is full. Try again later.";
const ANSWERED = "* Answered"; // for a follower, behind the answer to each command
const TOO_MANY = "* Too many connections from your address.";

/** What `/who` answers. */
function present(...names: string[]): string {
  const are = names.length === 1 ? "person is" : "people are";
  return `* ${names.length} ${are} here: ${names.join(", ")}`;
}

// --- Peers: bare sockets

/** Where a server is, for one with TLS what to trust, and whether to come in by WebSocket. */
type Address = { port: number; ca?: string | undefined; isWeb?: boolean };

// WebSocket frames (RFC 6455, section 5.2), which Bun's own client would not let us send badly.
const TEXT = 1;
const CLOSE = 8;
const PING = 9;
const PONG = 10;
const FIN = 0x80;
const MASKED = 0x80;

const UPGRADE = [
  "Upgrade: websocket",
  "Connection: Upgrade",
  "Sec-WebSocket-Version: 13",
  `Sec-WebSocket-Key: ${Buffer.alloc(16).toString("base64")}`,
];

/** A frame as a client sends it. The mask is zero, which changes nothing. */
function encodeFrame(
  opcode: number,
  payload: Uint8Array | string,
  { head = FIN, mask = MASKED } = {},
) {
  const bytes = Buffer.from(payload as Uint8Array);
  const header = Buffer.alloc(4);
  header[0] = head | opcode;
  header[1] = mask | (bytes.length < 126 ? bytes.length : 126);
  header.writeUInt16BE(bytes.length < 126 ? 0 : bytes.length, 2);
  const key = Buffer.alloc(mask === 0 ? 0 : 4);
  return Buffer.concat([header.subarray(0, bytes.length < 126 ? 2 : 4), key, bytes]);
}

/** Text as frames of whole lines, where that is possible. */
function encodeText(text: Buffer): Buffer {
  const frames: Buffer[] = [];
  let rest = text;
  while (rest.length > 0) {
    const newline = rest.lastIndexOf("\n", 16_000);
    const end = newline === -1 ? Math.min(rest.length, 16_000) : newline + 1;
    frames.push(encodeFrame(TEXT, rest.subarray(0, end)));
    rest = rest.subarray(end);
  }
  return Buffer.concat(frames);
}

/** The frame at the beginning of some bytes, and what follows it; undefined while it is not whole. */
function decodeFrame(bytes: Buffer) {
  if (bytes.length < 2) return undefined;
  const short = bytes.readUInt8(1); // there is no mask
  expect(short).toBeLessThan(127); // the server sends no frame of more than 16 KiB
  if (short < 126) return frameAt(bytes, 2, short);
  return bytes.length < 4 ? undefined : frameAt(bytes, 4, bytes.readUInt16BE(2));
}

/** The frame at the beginning of some bytes, whose payload begins at `start`. */
function frameAt(bytes: Buffer, start: number, length: number) {
  const end = start + length;
  if (bytes.length < end) return undefined;
  const opcode = bytes.readUInt8(0) & 0x0f;
  return { opcode, payload: bytes.subarray(start, end), rest: bytes.subarray(end) };
}

/** One end of a TCP connection, or of a WebSocket. It sends whatever it is told to, and reads lines. */
class Peer extends Watched {
  name = "";
  total = 0; // bytes received
  countsOnly = false; // what comes is counted and thrown away
  isOpen = true; // no FIN has come yet
  isSecured = false; // the TLS handshake is done
  ended = Promise.withResolvers<void>(); // a FIN has come, or the connection is gone
  closed = Promise.withResolvers<Error | undefined>(); // with an error if it was reset

  upgraded = Promise.withResolvers<void>(); // the WebSocket is open
  closeCode = 0; // with which the server has closed the WebSocket
  private frames: Buffer | null = null; // what has come of the next one; null without a WebSocket
  private unsent: Uint8Array = Buffer.alloc(0);
  private decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  private received: string[] = []; // lines
  private taken = 0; // of these lines
  private beginning = ""; // of the next line

  constructor(readonly socket: Socket<Peer>) {
    super();
  }

  /** Connects. `headers` are for the request that becomes a WebSocket. */
  static async connect(
    { port, ca, isWeb = false }: Address,
    headers: readonly string[] = [],
  ): Promise<Peer> {
    const socket = await Bun.connect<Peer>({
      hostname: "127.0.0.1",
      port,
      ...(ca && { tls: { ca } }),
      allowHalfOpen: true,
      socket: {
        open: (socket) => void (socket.data = new Peer(socket)),
        handshake: ({ data: peer }) => {
          peer.isSecured = true;
          peer.send(""); // nothing could be sent before
        },
        data: ({ data: peer }, chunk) => {
          if (peer.frames === null) peer.receive(chunk);
          else peer.receiveFrames(Buffer.concat([peer.frames, chunk]));
        },
        drain: ({ data: peer }) => peer.send(""),
        end: ({ data: peer }) => peer.end(),
        close: ({ data: peer }, error) => peer.close(error),
      },
    });
    cleanups.push(() => socket.terminate());
    if (isWeb) await socket.data.upgrade(port, headers);
    return socket.data;
  }

  /** Makes a WebSocket of the connection. */
  private async upgrade(port: number, headers: readonly string[]): Promise<void> {
    const request = ["GET /room HTTP/1.1", `Host: 127.0.0.1:${port}`, ...UPGRADE, ...headers];
    this.send([...request, "", ""].join("\r\n"));
    this.frames = Buffer.alloc(0);
    await Promise.race([this.upgraded.promise, this.ended.promise]);
  }

  private receiveFrames(bytes: Buffer): void {
    let rest = bytes;
    if (rest.toString("latin1", 0, 5) === "HTTP/") {
      const end = rest.indexOf("\r\n\r\n");
      if (end === -1) return;
      expect(rest.toString("latin1", 0, 12)).toBe("HTTP/1.1 101");
      this.upgraded.resolve();
      rest = rest.subarray(end + 4);
    }

    let frame = decodeFrame(rest);
    while (frame) {
      this.receiveFrame(frame.opcode, frame.payload);
      rest = frame.rest;
      frame = decodeFrame(rest);
    }
    this.frames = rest;
  }

  private receiveFrame(opcode: number, payload: Buffer): void {
    expect(payload.length).toBeLessThanOrEqual(16 * 1024);
    if (opcode === TEXT) this.receive(payload);
    if (opcode === PING) this.sendRaw(encodeFrame(PONG, payload));
    if (opcode === CLOSE) this.endByFrame(payload);
  }

  private endByFrame(payload: Buffer): void {
    this.closeCode = payload.length >= 2 ? payload.readUInt16BE(0) : 1005; // no code was sent
    this.end();
  }

  /** Ends what it sends in good order. */
  finish(): void {
    if (this.frames === null) this.socket.shutdown();
    else this.sendRaw(encodeFrame(CLOSE, ""));
  }

  receive(chunk: Uint8Array): void {
    this.total += chunk.length;
    if (!this.countsOnly) {
      const lines = this.decoder.decode(chunk, { stream: true }).split("\n");
      lines[0] = this.beginning + lines[0];
      this.beginning = lines.pop() ?? "";
      for (const line of lines) this.received.push(line);
    }
    this.change();
  }

  end(): void {
    this.isOpen = false;
    this.ended.resolve();
    this.change();
  }

  close(error?: Error): void {
    this.end();
    this.closed.resolve(error);
  }

  /** Sends bytes, at once or as soon as the other side takes them. */
  send(bytes: string | Uint8Array): void {
    const text = Buffer.from(bytes as Uint8Array);
    this.sendRaw(this.frames === null ? text : encodeText(text));
  }

  /** Sends bytes as they are, also to a WebSocket. */
  sendRaw(bytes: Uint8Array): void {
    this.unsent = Buffer.concat([this.unsent, bytes]);
    if (this.unsent.length > 0)
      this.unsent = this.unsent.subarray(Math.max(0, this.socket.write(this.unsent)));
    this.change();
  }

  /** Whether the kernel has taken all that `send` was given. */
  get isSent(): boolean {
    return this.unsent.length === 0;
  }

  /** A line that has come, without its newline; undefined when there is none yet. */
  take(): string | undefined {
    const line = this.received[this.taken++];
    if (line === undefined) {
      this.received = [];
      this.taken = 0;
    }
    return line;
  }

  /** The next line; null when the connection ends before there is one. */
  async lineOrEnd(): Promise<string | null> {
    return await this.when(() => this.take() ?? (this.isOpen ? undefined : null));
  }

  /** The next line. @throws when there is none */
  async line(): Promise<string> {
    const line = await this.lineOrEnd();
    if (line === null) throw new Error(`the connection of ${this.name} has ended`);
    return line;
  }

  /** The next lines. */
  async lines(count: number): Promise<string[]> {
    const lines: string[] = [];
    while (lines.length < count) lines.push(await this.line());
    return lines;
  }

  /** All lines before the next one like `last`, which is taken as well. */
  async until(last: string | RegExp): Promise<string[]> {
    const lines: string[] = [];
    for (;;) {
      const line = await this.line();
      if (typeof last === "string" ? line === last : last.test(line)) return lines;
      lines.push(line);
    }
  }

  /** All lines up to the end of the connection. */
  async rest(): Promise<string[]> {
    const lines: string[] = [];
    for (let line = await this.lineOrEnd(); line !== null; line = await this.lineOrEnd())
      lines.push(line);
    return lines;
  }

  /** Asks the server for an answer. What was sent before has been handled then; returns what came. */
  async ping(): Promise<string[]> {
    this.send("/ping\n");
    return await this.until("* Unknown command /ping. Try /help.");
  }
}

/** Connects, and reads the welcome. */
async function greeted(server: Address): Promise<Peer> {
  const peer = await Peer.connect(server);
  expect(await peer.line()).toBe(WELCOME);
  return peer;
}

/** Enters the room, by a name or by one and its password, and reads the roster. */
async function enter(server: Address, login: string): Promise<Peer> {
  const peer = await greeted(server);
  peer.name = login.split(" ", 1).join();
  peer.send(`${login}\n`);
  expect(await peer.line()).toStartWith("* The room contains: ");
  return peer;
}

/** Several enter, one after the other, and each has heard of those after it. */
async function enterAll<const Names extends readonly string[]>(server: Address, ...names: Names) {
  const peers: Peer[] = [];
  for (const login of names) {
    const peer = await enter(server, login);
    for (const other of peers)
      expect(await other.line()).toBe(`* ${peer.name} has joined the chat`);
    peers.push(peer);
  }
  return peers as { -readonly [Place in keyof Names]: Peer };
}

/** The same, and the room as well. */
async function gather<const Names extends readonly string[]>(room: Server, ...names: Names) {
  return [room, ...(await enterAll(room, ...names))] as const;
}

/** Several enter at the same time. */
const enterTogether = (server: Address, names: readonly string[]) =>
  Promise.all(names.map((name) => enter(server, name)));

/**
 * One stops reading, and another talks until the server keeps `least` bytes for the slow one. Returns
 * what was said, of which neither the slow one nor anybody else has read a line.
 */
async function lagBehind(server: Server, speaker: Peer, slow: Peer, least: number) {
  slow.socket.pause();
  const said: string[] = [];
  const text = "q".repeat(4000);
  while (queued(server, slow.name) < least) {
    const missing = least - queued(server, slow.name);
    const lines = times(missing > 100_000 ? 20 : 1, (number) => `${said.length + number} ${text}`);
    speaker.send(toText(lines));
    expect(await speaker.ping()).toEqual([]);
    said.push(...lines.map((line) => `[${speaker.name}] ${line}`));
  }
  return said;
}

/** Sees that the room still works for a speaker and a listener. */
async function stillServes(server: Address, speaker: Peer, listener: Peer): Promise<void> {
  speaker.send("still there?\n");
  await listener.until(`[${speaker.name}] still there?`);
  const latecomer = await enter(server, "latecomer");
  await listener.until("* latecomer has joined the chat");
  latecomer.socket.end();
  await listener.until("* latecomer has left the chat");
}

// --- Programs

/** Starts a program in a pipe. */
function inPipe(command: string[]) {
  const out = new Transcript();
  const err = new Transcript();
  const stdio: ["pipe", "pipe", "pipe"] = ["pipe", "pipe", "pipe"];
  const child = Bun.spawn(command, { cwd: import.meta.dir, stdio });
  cleanups.push(() => child.kill("SIGKILL"));
  const read = Promise.all([out.read(child.stdout), err.read(child.stderr)]);

  return {
    child,
    out,
    err,
    type: (text: string) => void child.stdin.write(text),

    /** Types the last of the input. */
    end(text = "") {
      child.stdin.write(text);
      child.stdin.end();
    },

    /** Waits for the end. Resolves with the exit code and all output. */
    async result() {
      await read;
      return { code: await child.exited, out: out.text, err: err.text };
    },
  };
}

type Look = { columns?: number; rows?: number; env?: Record<string, string> };

/** Starts a program in a pseudo-terminal, of which `out` is all that it was sent. */
function inTerminal(command: string[], { columns = 80, rows = 24, env = {} }: Look = {}) {
  const out = new Transcript();
  const closed = Promise.withResolvers<void>();
  const decoder = new TextDecoder();
  // With CI=true a terminal is taken for one without colours.
  const plain = { CI: undefined, NO_COLOR: "1", TERM: "xterm-256color", LC_ALL: "C.UTF-8" };
  const child = Bun.spawn(command, {
    cwd: import.meta.dir,
    env: { ...process.env, ...plain, ...env },
    terminal: {
      cols: columns,
      rows,
      data: (_, bytes) => out.add(decoder.decode(bytes, { stream: true })),
      exit: () => closed.resolve(),
    },
  });
  cleanups.push(() => child.kill("SIGKILL"));

  const terminal = {
    child,
    out,
    type: (keys: string) => void child.terminal?.write(keys),
    picture: () => picture(out.text, columns, rows),

    /** Waits until these rows are at the bottom, without times, with `|` for the cursor. */
    async shows(wanted: string) {
      const look = () => `\n${terminal.picture().marked}`;
      await out.soon(
        () => look().endsWith(`\n${wanted}`) || undefined,
        () => `no ${JSON.stringify(wanted)} in ${look().slice(-2000)}`,
      );
    },

    /** Types keys, and waits until they have made the screen so. */
    async press(keys: string, wanted: string) {
      terminal.type(keys);
      await terminal.shows(wanted);
    },

    /** Types keys, and waits until this is printed. */
    async prints(keys: string, wanted: string | RegExp) {
      terminal.type(keys);
      return await out.until(wanted);
    },

    /** Waits for the last words, and for the end with this exit code. */
    async ends(code: number, lastWords = "") {
      await closed.promise;
      await out.until(lastWords);
      expect(await child.exited).toBe(code);
    },

    /** Makes the window wider or narrower, and notes it in the output, for `picture`. */
    resize(columns: number) {
      out.add(`\x1b[8;${rows};${columns}t`);
      child.terminal?.resize(columns, rows);
    },
  };
  return terminal;
}

/** What the terminal gets when somebody pastes. */
const paste = (text: string) => `\x1b[200~${text}\x1b[201~`;

/** Starts `bun server.ts` on a free port, and waits until it listens. */
const serve = (...options: string[]) =>
  serveBy([process.execPath, "server.ts", "--port", "0", ...options]);

/** Starts a server by some other command. */
async function serveBy(command: string[]) {
  const program = inPipe(command);
  const [, port] = await program.out.until(/Server is running on 127\.0\.0\.1:(\d+), waiting for/);
  return { ...program, port: Number(port), pid: program.child.pid };
}

/** The connection of a client in this process, and all that it shows. It tries again at once. */
function inProcess(port: number, recall = 0) {
  const shown = new Transcript();
  const notices = new Transcript();
  const screen = {
    isPerson: false,
    ask: async () => undefined,
    askPassword: async () => undefined,
    endConversation() {},
    waiting: () => 0,
    show(entries: readonly Entry[]) {
      shown.add(toText(entries.map(({ text }) => text)));
      return true;
    },
    showRoster: ({ text }: Entry) => shown.add(`${text}\n`),
    notice: (text: string) => notices.add(`${text}\n`),
    whenTaken() {},
    showOwn() {},
    print() {},
    ignore() {},
    close() {},
  };
  PACE.retry = 1;
  cleanups.push(() => (PACE.retry = 1000));
  const room = receiveMessages({ host: "127.0.0.1", port, tls: false }, screen, recall);
  cleanups.push(async () => {
    void room.leave();
    await room.leave(); // does not wait
  });
  return { room, shown, notices };
}

/** The command for `bun client.ts`. */
function client(port: number, ...args: string[]) {
  return [process.execPath, "client.ts", "--port", `${port}`, ...args];
}

/** The same with other times, and with more code that is run before it. */
function pacedClient(pace: Partial<typeof PACE>, port: number, args: string[] = [], code = "") {
  const program = `
    const { PACE, main } = await import("./client.ts");
    Object.assign(PACE, ${JSON.stringify(pace)});
    ${code};
    await main();`;
  return [process.execPath, "--eval", program, "--", "--port", `${port}`, ...args];
}

/** The same with little time for a server to speak, and none at all between two tries. */
function hastyClient(port: number, ...args: string[]): string[] {
  const pace = { silence: 200, retry: 1, doubt: 50, moment: 20, lastWords: 100, perLine: 0 };
  return pacedClient(pace, port, args);
}

// --- A foreign server

type Habits = {
  port?: number;
  tls?: Bun.TLSOptions;
  greeting?: string; // "" for none
  roster?: string; // "" for none
  newline?: string; // after the greeting and after a refusal; "" for none
  greetsLate?: number; // ms; those who come after the first one wait so long
  farewell?: string; // what is said before the FIN is answered
  isFull?: boolean; // hangs up after the greeting
  pause?: number; // ms between a refusal and the FIN
  resets?: boolean; // answers a FIN with a reset
  neverCloses?: boolean; // does not answer a FIN
  stopsReading?: boolean; // once a guest has a name
  refusals?: readonly string[]; // what the next names are answered with
  isOurs?: boolean; // it greets like a server of bun-chat, and confirms what it hears
};

/** The smallest server of Budget Chat. Its transcript holds "joined: NAME", "NAME: text" and such. */
function budgetChat(habits: Habits = {}) {
  const { isOurs, newline = "\n" } = habits;
  const { greeting = isOurs ? WELCOME : "Welcome to the chat! What is your name?" } = habits;
  let position = 9; // of the last mark
  const refusals = [...(habits.refusals ?? [])];
  const { roster = "* The room contains: bob, carol" } = habits;
  const heard = new Transcript();
  const guests: Peer[] = [];
  const finish = (guest: Peer) => void (guest.isSent && guest.socket.shutdown());

  function confirm(guest: Peer, line: string): void {
    const [name] = guest.name.split(" "); // without its password
    if (line.startsWith("/since")) {
      const since = `* Since ${position} until ${position}`;
      guest.send(toText([since, `* ${name} has joined the chat`, `* ${++position}`]));
    } else {
      guest.send(line.startsWith("/") ? "* Answered\n" : `[${name}] ${line}\n* ${++position}\n`);
    }
  }

  function takeLine(guest: Peer, line: string): void {
    if (guest.name) {
      heard.add(`${guest.name}: ${line}\n`);
      if (isOurs) confirm(guest, line);
      return;
    }
    const refusal = refusals.shift();
    if (refusal !== undefined) {
      heard.add(`refused: ${line}\n`);
      guest.send(refusal && `${refusal}${newline}`);
      if (habits.pause) setTimeout(finish, habits.pause, guest);
      else finish(guest);
      return;
    }
    heard.add(`joined: ${line}\n`);
    guest.name = line;
    if (roster) guest.send(`${roster}\n`);
    if (habits.stopsReading) guest.socket.pause();
  }

  const listener: TCPSocketListener<Peer> = Bun.listen<Peer>({
    hostname: "127.0.0.1",
    port: habits.port ?? 0,
    allowHalfOpen: true,
    ...(habits.tls && { tls: habits.tls }),
    socket: {
      open(socket) {
        const guest = new Peer(socket);
        socket.data = guest;
        guests.push(guest);
        const delay = guests.length > 1 ? habits.greetsLate : undefined;
        const greet = () => guest.send(greeting && `${greeting}${newline}`);
        if (delay === undefined) greet();
        else setTimeout(greet, delay);
        if (habits.isFull) finish(guest);
      },
      data({ data: guest }, chunk) {
        guest.receive(chunk);
        for (let line = guest.take(); line !== undefined; line = guest.take())
          takeLine(guest, line);
      },
      drain({ data: guest }) {
        guest.send("");
        if (!guest.isOpen && !habits.neverCloses) finish(guest);
      },
      end({ data: guest }) {
        guest.end();
        heard.add(`end of ${guest.name}\n`);
        if (habits.resets) guest.socket.terminate();
        if (habits.resets || habits.neverCloses) return;
        guest.send(habits.farewell ?? "");
        finish(guest);
      },
      close: ({ data: guest }) => heard.add(`closed ${guest.name}\n`),
    },
  });
  const stop = () => listener.stop(true);
  cleanups.push(stop);

  return {
    port: listener.port,
    heard,
    guests, // in order of coming
    refusals,
    stop,

    /** Says lines to everybody. */
    say: (...lines: string[]) => {
      for (const guest of guests) if (guest.name) guest.send(toText(lines));
    },

    /** Resets all connections. */
    drop: () => {
      for (const guest of guests) guest.socket.terminate();
    },
  };
}

type Joining = Look & {
  habits?: Habits;
  server?: ReturnType<typeof budgetChat>;
  args?: string[];
  pace?: Partial<typeof PACE>;
};

/** Starts the client in a terminal as Alex, and waits for its prompt in a foreign server's room. */
async function joined(how: Joining = {}) {
  const { habits, server = budgetChat(habits), args = [], pace, ...look } = how;
  const all = ["--name", "Alex", ...args];
  const command = pace ? pacedClient(pace, server.port, all) : client(server.port, ...all);
  const alex = inTerminal(command, look);
  await alex.out.until("* ");
  await alex.out.until("You: ");

  /** Types keys, and waits until the server has heard what it should. */
  async function say(keys: string, heard: string | RegExp) {
    alex.type(keys);
    await server.heard.until(heard);
  }
  return { alex, server, say };
}

/** Starts the client in a pipe as Alex, by a script of the shell, with a foreign server. */
function inPipeWith(habits: Habits = {}, start = client, script = `exec "$0" "$@"`) {
  const server = budgetChat(habits);
  const command = start(server.port, "--name", "Alex");
  return { server, alex: inPipe(["bash", "-c", script, ...command]) };
}

// --- A proxy

/** A proxy in front of a port, which cuts each connection after some bytes, until it is calm. */
function cutter(port: () => number, random: (limit: number) => number) {
  type Side = { other?: Socket<Side>; early: Buffer[]; budget: { bytes: number } };
  const state = { isCalm: true, cuts: 0 };

  function forward(from: Socket<Side>, chunk: Buffer): void {
    const { other, early, budget } = from.data;
    if (!other) {
      early.push(chunk);
      return;
    }
    const passed = state.isCalm ? chunk : chunk.subarray(0, budget.bytes);
    budget.bytes -= passed.length;
    other.write(passed); // short enough for the kernel to take it
    if (passed.length === chunk.length) return;
    state.cuts++;
    const isReset = random(2) === 0;
    for (const socket of [from, other]) {
      if (isReset) socket.terminate();
      else socket.end();
    }
  }

  const handlers: Bun.SocketHandler<Side> = {
    data: (socket, chunk) => forward(socket, Buffer.from(chunk)),
    close: (socket) => void socket.data.other?.end(),
    error() {},
  };
  const listener = Bun.listen<Side>({
    hostname: "127.0.0.1",
    port: 0,
    socket: {
      ...handlers,
      open(socket) {
        const budget = { bytes: 60 + random(random(4) > 0 ? 1200 : 8000) };
        socket.data = { early: [], budget };
        const data: Side = { other: socket, early: [], budget };
        Bun.connect<Side>({ hostname: "127.0.0.1", port: port(), data, socket: handlers }).then(
          (other) => {
            socket.data.other = other;
            for (const chunk of socket.data.early) forward(socket, chunk);
          },
          () => socket.end(),
        );
      },
    },
  });
  cleanups.push(() => listener.stop(true));
  return { port: listener.port, state };
}

// --- A screen

/** A row of the screen: a cell for each column, and whether the terminal wrapped it by itself. */
type ScreenRow = { cells: string[]; isWrapped: boolean };

/**
 * What a person sees of `output` in a terminal so many columns wide, and where the cursor is. Without
 * a height nothing is out of reach of the cursor. When it is resized, it wraps its rows anew.
 */
function picture(output: string, columns: number, height = Infinity) {
  let rows: ScreenRow[] = [];
  let wraps = true;
  let x = 0;
  let y = 0;
  let top = 0; // the first row that the cursor can reach
  const row = (y: number) => (rows[y] ??= { cells: [], isWrapped: false });

  function feed(): void {
    y++;
    row(y);
    top = Math.max(top, y - height + 1);
  }

  function print(character: string): void {
    const width = Bun.stringWidth(character);
    if (x + width > columns && wraps) {
      row(y).isWrapped = true;
      feed();
      x = 0;
    }
    x = Math.min(x, columns - width);
    const { cells } = row(y);
    while (cells.length < x) cells.push(" ");
    if (width > 0) cells.splice(x, width, character, ...(width === 2 ? [""] : []));
    else cells[x - 1] += character;
    x += width;
  }

  function resize(next: number): void {
    const old = rows;
    const cursor = { x, y };
    rows = [];
    let line: string[] = []; // what was wrapped
    for (const [number, { cells, isWrapped }] of old.entries()) {
      if (number === cursor.y) {
        y = rows.length + Math.floor((line.length + cursor.x) / next);
        x = (line.length + cursor.x) % next;
      }
      line.push(...cells);
      if (isWrapped) continue;
      do rows.push({ cells: line.splice(0, next), isWrapped: line.length > 0 });
      while (line.length > 0);
    }
    columns = next;
    row(y);
    top = Math.max(0, rows.length - height);
  }

  row(0);
  const pieces = output.matchAll(/\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])/gu);
  for (const [, parameter = "", code = "", character = ""] of pieces) {
    const count = Number.parseInt(parameter) || 1;
    if (code === "A") y = Math.max(top, y - count);
    else if (code === "C") x = Math.min(columns - 1, x + count);
    else if (code === "H") {
      x = 0;
      y = top;
    } else if (code === "J" || code === "K") {
      const { cells } = row(parameter ? top : y);
      cells.splice(parameter ? 0 : x);
      row(y).isWrapped = false;
      if (code === "J") rows.splice((parameter ? top : y) + 1);
    } else if (parameter === "?7") wraps = code === "h";
    else if (code === "t") resize(Number(parameter.split(";")[2]));
    else if (character === "\r") x = 0;
    else if (character === "\n") feed();
    else if (character === "\t") x = Math.min(columns - 1, x - (x % 8) + 8);
    else if (character !== "\x07" && !code) print(character);
  }

  const toLine = (row?: ScreenRow) => (row?.cells ?? []).join("").trimEnd();
  const toLines = (some: ScreenRow[]) =>
    Array.from(some, (row) => toLine(row).replace(/^\d\d:\d\d /, ""));
  const text = toLines(rows).join("\n").trimEnd(); // without the times
  const { cells } = row(y);
  const marked = [...cells.slice(0, x), ...Array(Math.max(0, x - cells.length)).fill(" "), "|"];
  marked.push(...cells.slice(x));
  rows[y] = { cells: marked, isWrapped: false };
  return { text, x, y, marked: toLines(rows).join("\n").trimEnd() }; // `|` stands where the cursor is
}

// --- Certificates

const folder = fs.mkdtempSync(`${tmpdir()}/bun-chat-`);
afterAll(() => {
  Bun.WebView.closeAll(); // whose files are there
  fs.rmSync(folder, { recursive: true, maxRetries: 10 });
});

/** Runs openssl with these words. */
async function openssl(words: string): Promise<void> {
  expect(await Bun.spawn(["openssl", ...words.split(" ")], { stderr: "ignore" }).exited).toBe(0);
}

/** Makes a certificate, self-signed unless told otherwise, in the way that the README describes. */
async function makeCertificate(name: string, hosts = "DNS:localhost,IP:127.0.0.1", more = "") {
  const cert = `${folder}/${name}-cert.pem`;
  const key = `${folder}/${name}-key.pem`;
  const newKey = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
  const subject = `-subj /CN=${name} -addext subjectAltName=${hosts}`;
  await openssl(`req -x509 ${newKey} -days 2 ${subject} -keyout ${key} -out ${cert}${more}`);
  return { cert, key, ca: await Bun.file(cert).text() };
}

const certificate = await makeCertificate("first");
const renewed = await makeCertificate("second");

// --- Histories

/** The name of a file that does not exist yet, in a folder of its own. */
const newFile = () => `${fs.mkdtempSync(`${folder}/history-`)}/chat.db`;

/** A row of a history: what a batch said, at its position. An empty text is a gap. */
type Row = readonly [at: number, text: string];

/** Makes a history as a server leaves it behind. Returns its file. */
function writeHistory(rows: readonly Row[], { version = 1, application = 0x62756e63 } = {}) {
  const file = newFile();
  const database = new Database(file);
  database.run("PRAGMA secure_delete = ON"); // so that no copy of a text stays behind
  database.run("CREATE TABLE history (at INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT");
  database.run(`PRAGMA application_id = ${application}`);
  database.run(`PRAGMA user_version = ${version}`);
  const insert = database.query("INSERT INTO history VALUES (?, ?)");
  database.transaction(() => rows.forEach(([at, text]) => insert.run(at, text)))();
  database.close(true);
  return file;
}

/** Lines of some length, each of them a batch, behind the gap with which each history begins. */
function longHistory(count: number, length: number): { file: string; lines: string[] } {
  const lines = numbered(count, "old").map((line) => line.padEnd(length, " ."));
  const rows = lines.map((line, number): Row => [2_000_000 + number, `${line}\n`]);
  return { file: writeHistory([[1_000_000, ""], ...rows]), lines };
}

const SINCE = /^\* Since (\d+) until (\d+)$/;
const MARK = /^\* (\d+)$/;

/** Enters, and says /since. Resolves with the two positions of the answer as well. */
async function follow(server: Address, name: string, since: number | "" = 0) {
  const peer = await enter(server, name);
  peer.send(`/since ${since}\n`);
  const [, from, until] = SINCE.exec(await peer.line()) ?? [];
  return { peer, from: Number(from), until: Number(until) };
}

type Batch = { lines: string[]; at: number };

/** The lines that a follower hears up to the next mark, and the position that it tells. */
async function nextBatch(follower: Peer): Promise<Batch> {
  const lines: string[] = [];
  for (;;) {
    const line = await follower.line();
    const [, at] = MARK.exec(line) ?? [];
    if (at) return { lines, at: Number(at) };
    lines.push(line);
  }
}

/** The batches up to the one that has this line. Their marks must rise. */
async function batchesUntil(follower: Peer, last: string): Promise<Batch[]> {
  const batches: Batch[] = [];
  let position = 0;
  for (;;) {
    const batch = await nextBatch(follower);
    expect(batch.at).toBeGreaterThan(position);
    position = batch.at;
    batches.push(batch);
    if (batch.lines.includes(last)) return batches;
  }
}

/** What a follower hears up to this line, without the marks. */
async function linesUntil(follower: Peer, last: string): Promise<string[]> {
  return (await batchesUntil(follower, last)).flatMap(({ lines }) => lines);
}

// --- A browser

const BROWSERS = [
  "chromium",
  "chromium-browser",
  "google-chrome",
  "google-chrome-stable",
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
];

const hasBrowser =
  process.env["BUN_CHROME_PATH"] !== undefined || BROWSERS.some((program) => Bun.which(program));

const PATIENCE = 8000; // ms that a test waits for something in the page

/** A test in a browser. Without one it is skipped on somebody's machine, and fails in CI. */
const testInBrowser = test.skipIf(!hasBrowser && !process.env["CI"]);

// What the tests ask the page with, and what it must not do, told by its console.
const IN_PAGE = `
  const $ = (id) => document.getElementById(id);

  const rowsOf = (list) => Array.from($(list).children, (row) => {
    const textOf = (part) => row.querySelector(part)?.textContent ?? "";
    const name = textOf(".name").replace(" (you)", "");
    const words = textOf(".words") || row.textContent;
    const text = name ? "[" + name + "] " + words : words;
    return { kind: row.className.replace(/ ?again/, ""), name, words, text, time: textOf("time") };
  });

  const textsOf = (list) => rowsOf(list).map(({ text }) => text);

  const namesShown = () => Array.from($("names").children, (row) => row.textContent);

  const isAtEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 2;

  for (const type of ["error", "unhandledrejection", "securitypolicyviolation"])
    addEventListener(type, (event) =>
      console.error(type, event.message ?? String(event.reason ?? event.violatedDirective)));

  function isTooWide() {
    const places = document.querySelectorAll(":root, #door, #room, #log, #people, #write");
    const edge = $("log").getBoundingClientRect().right;
    const isBeyond = (row) => {
      const range = new Range();
      range.selectNodeContents(row);
      return range.getBoundingClientRect().right > edge;
    };
    return Array.from(places).some(({ scrollWidth, clientWidth }) => scrollWidth > clientWidth) ||
      Array.from($("lines").children).some(isBeyond);
  }

  /** The red, green and blue of a style's colour on what is below an element. */
  const pixel = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  function colourOf(element, isText) {
    const below = [];
    for (let one = element; one; one = one.parentElement) below.unshift(getComputedStyle(one));
    pixel.globalAlpha = 1;
    for (const { backgroundColor } of below) {
      pixel.fillStyle = backgroundColor;
      pixel.fillRect(0, 0, 1, 1);
    }
    if (isText) {
      pixel.globalAlpha = below.reduce((product, { opacity }) => product * opacity, 1);
      pixel.fillStyle = getComputedStyle(element).color;
      pixel.fillRect(0, 0, 1, 1);
    }
    return Array.from(pixel.getImageData(0, 0, 1, 1).data.slice(0, 3));
  }

  /** How light a text is, or what it stands on (WCAG 2.2). */
  function luminanceOf(element, isText) {
    const [red, green, blue] = colourOf(element, isText).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  function contrastOf(element) {
    const text = luminanceOf(element, true);
    const back = luminanceOf(element, false);
    return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
  }

  const isSeen = (element) => element.clientHeight !== 1 &&
    element.checkVisibility({ visibilityProperty: true, opacityProperty: true });

  /** All that have words of their own and can be seen. */
  function elementsWithText() {
    return Array.from(document.body.querySelectorAll("*")).filter((element) =>
      isSeen(element) &&
      Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.data.trim()));
  }
`;

type ShownRow = { kind: string; name: string; words: string; text: string; time: string };
type Width = { width?: number; height?: number };

/** A tab of the browser. The keys that it gets are real ones. */
class Page {
  readonly problems: string[] = []; // what the page has complained of
  readonly view: Bun.WebView;

  constructor({ width = 1000, height = 700 }: Width) {
    this.view = new Bun.WebView({
      backend: { type: "chrome", url: false, argv: ["--no-sandbox"] },
      dataStore: { directory: `${folder}/browser` },
      width,
      height,
      console: (type, ...words) => {
        if (type === "error" || type === "warn") this.problems.push(words.join(" "));
      },
    });
  }

  /** What an expression is in the page. */
  async evaluate<T = unknown>(expression: string): Promise<T> {
    return await this.view.evaluate<T>(expression);
  }

  /** Does something in the page that has no result. */
  async run(statements: string): Promise<void> {
    await this.view.evaluate(`(() => { ${statements} })()`);
  }

  /** Waits until an expression is true in the page. */
  async until(expression: string): Promise<void> {
    const deadline = Date.now() + PATIENCE;
    while (!(await this.evaluate(expression))) {
      if (Date.now() > deadline) {
        const shown = await this.evaluate<string>("document.body.innerText");
        throw new Error(`no ${expression} in ${JSON.stringify(shown.slice(-2000))}`);
      }
      await Bun.sleep(10);
    }
  }

  rows = (list = "lines") => this.evaluate<ShownRow[]>(`rowsOf("${list}")`);
  texts = (list = "lines") => this.evaluate<string[]>(`textsOf("${list}")`);

  /** What people said, as it stands in the log. */
  said = async () => (await this.texts()).filter((text) => text.startsWith("["));

  /** The names in the list of people. */
  names = () => this.evaluate<string[]>("namesShown()");

  /** Waits until the list of people is this. */
  async lists(...names: string[]): Promise<void> {
    await this.until(`namesShown().join() === ${JSON.stringify(names.join())}`);
  }

  /** Waits until there is a row with this text. */
  async sees(text: string, list = "lines"): Promise<void> {
    await this.until(`textsOf("${list}").includes(${JSON.stringify(text)})`);
  }

  /** Loads the page anew, which leaves the room. */
  async reload(): Promise<void> {
    await this.view.reload();
    await this.until(`document.activeElement.id === "name"`);
  }

  /** Waits until an element has this text. */
  async has(id: string, text: string): Promise<void> {
    await this.until(`$("${id}").textContent === ${JSON.stringify(text)}`);
  }

  /** The id of the element that gets the keys. */
  focus = () => this.evaluate<string>("document.activeElement.id");

  /** What is in an input or in the box for writing. */
  value = (id = "text") => this.evaluate<string>(`$("${id}").value`);

  /** Replaces what is in an input, as somebody does who selects all of it. */
  async fill(id: string, words: string): Promise<void> {
    await this.run(`$("${id}").focus(); $("${id}").select()`);
    await this.view.type(words);
  }

  /** Types a line into whatever has the focus, and sends it. */
  async say(line: string): Promise<void> {
    await this.view.type(line);
    await this.view.press("Enter");
  }

  async press(...keys: string[]): Promise<void> {
    for (const key of keys) await this.view.press(key);
  }

  click = (id: string) => this.view.click(`#${id}`);

  /** Gives a name at the door, and waits for the room. */
  async enter(name: string): Promise<void> {
    await this.fill("name", name);
    await this.press("Enter");
    await this.arrives(name);
  }

  async arrives(name: string): Promise<void> {
    await this.has("status", `You are ${name}`);
  }

  /** Makes the page believe that somebody looks at it, or not: a headless browser always does. */
  async lookAt(isLookedAt: boolean): Promise<void> {
    await this.run(`
      Object.defineProperty(document, "hidden", { value: ${!isLookedAt}, configurable: true });
      document.hasFocus = () => ${isLookedAt};
      dispatchEvent(new Event("${isLookedAt ? "focus" : "blur"}"));
      document.dispatchEvent(new Event("visibilitychange"))`);
  }

  /** Takes from the page all timers of half a second or more: it cannot come back by itself. */
  async stopClock(): Promise<void> {
    await this.run(`
      const start = setTimeout;
      globalThis.setTimeout = (work, ms, ...rest) => (ms < 500 ? start(work, ms, ...rest) : 0)`);
  }

  /** Tells the page that there is a network. */
  async goOnline(): Promise<void> {
    await this.run(`dispatchEvent(new Event("online"))`);
  }

  async setDark(isDark: boolean): Promise<void> {
    const value = isDark ? "dark" : "light";
    const features = [{ name: "prefers-color-scheme", value }];
    await this.view.cdp("Emulation.setEmulatedMedia", { features });
  }

  /** Whether anything is wider than its place, so that one would have to scroll to the side. */
  isTooWide = () => this.evaluate<boolean>("isTooWide()");

  /** The words that are hard to read, with their contrast. */
  pale = () =>
    this.evaluate<string[]>(`
      elementsWithText().filter((element) => contrastOf(element) < 4.7)
        .map((element) => contrastOf(element).toFixed(2) + " " + element.textContent)`);
}

/** Opens the page of a room in a tab of its own, and fails the test if the page complains. */
async function openPage(room: { webPort?: number | undefined }, size: Width = {}): Promise<Page> {
  const page = new Page(size);
  cleanups.push(() => expect(page.problems).toEqual([]));
  cleanups.push(() => page.view.close());
  await page.view.navigate("about:blank"); // so that there is something to send commands to
  await page.view.cdp("Page.addScriptToEvaluateOnNewDocument", { source: IN_PAGE });
  await page.view.navigate(`http://127.0.0.1:${room.webPort}/`);
  await page.until(`document.activeElement.id === "name"`);
  return page;
}

/** Enters the room with a browser. */
async function enterByPage(room: Server, name: string, size: Width = {}): Promise<Page> {
  const page = await openPage(room, size);
  await page.enter(name);
  return page;
}

/** Opens a room in which bob is, by a bare socket, and alice comes in with a browser. */
async function meetInPage() {
  const room = open({ web: 0 });
  const bob = await enter(room, "bob");
  const page = await enterByPage(room, "alice");
  expect(await bob.line()).toBe("* alice has joined the chat");
  return { room, bob, page };
}

/** Cuts the connection of somebody. */
function cutOff(room: Server, name: string): void {
  room.clients.find((client) => client.name === name)?.socket.terminate();
}

// --- Registered names

/** Sends a line. Resolves with all that comes then, up to the answer to /ping. */
async function answersTo(peer: Peer, line: string): Promise<string[]> {
  peer.send(`${line}\n`);
  return await peer.ping();
}

/** Gives a first line. Resolves with all that comes then, up to the end of the connection. */
async function refusalOf(server: Address, firstLine: string): Promise<string[]> {
  const peer = await greeted(server);
  peer.send(`${firstLine}\n`);
  const heard = await peer.rest();
  peer.socket.end();
  return heard;
}

const PASSWORD = "correct horse"; // of alice
const LOGIN = `alice ${PASSWORD}`;

/** The answer to a registered name without its password. */
const askedFor = (name: string) =>
  `* The name ${name} is registered. Enter it with its password: ${name} PASSWORD`;

/** The answer to its owner. */
const registered = (name: string) => askedFor(name).replace("registered", "registered now");

/** The answer to a password for a name that has none. */
const notRegistered = (name: string) =>
  `* The name ${name} is not registered, so it has no password. Enter it alone: ${name}`;

/** Makes the file of a room in which alice has registered her name. */
async function registerAlice(): Promise<string> {
  const file = newFile();
  const room = startServer({ port: 0, db: file });
  const alice = await enter(room, "alice");
  expect(await answersTo(alice, `/register ${PASSWORD}`)).toEqual([registered("alice")]);
  alice.socket.terminate();
  await room.stop();
  return file;
}

const fileOfAlice = await registerAlice();

/** A copy of that file. A test can change it by these statements. */
function withAlice(...changes: string[]): string {
  const file = newFile();
  fs.copyFileSync(fileOfAlice, file);
  using database = new Database(file);
  for (const change of changes) database.run(change);
  return file;
}

/** The same with another hash of the password. */
const withHash = (hash: string) => withAlice(`UPDATE accounts SET hash = '${hash}'`);

/** The hash of alice's password in the file of a room, which all leave first. */
async function hashOfAlice(room: Server, file: string, ...peers: Peer[]): Promise<string> {
  for (const { socket } of peers) socket.terminate();
  await room.stop();
  using database = new Database(file);
  const account = database.query<{ hash: string }, []>("SELECT hash FROM accounts").get();
  return account?.hash ?? "";
}

/** Holds up work on passwords from now on, until `goOn` is called. */
function holdPasswords() {
  const { hash, verify } = Bun.password;
  const tried: unknown[] = []; // passwords, in the order in which it begins
  const begun = Promise.withResolvers<void>();
  const released = Promise.withResolvers<void>();

  async function hold(password: unknown): Promise<void> {
    tried.push(password);
    begun.resolve();
    await released.promise;
  }

  Object.assign(Bun.password, {
    hash: (...given: Parameters<typeof hash>) => hold(given[0]).then(() => hash(...given)),
    verify: (...given: Parameters<typeof verify>) => hold(given[0]).then(() => verify(...given)),
  });
  cleanups.push(() => {
    Object.assign(Bun.password, { hash, verify });
    released.resolve();
  });
  return { tried, begun: begun.promise, goOn: () => released.resolve() };
}

const FAR = "203.0.113.7"; // an address that is not of this machine (RFC 5737)

/** Opens rooms in which everybody seems to come from the address of `place` at that time. */
function openFrom(place: { address: string }, openRoom = open): typeof open {
  return (options) => {
    const { listen } = Bun;
    const listenFrom = (how: Bun.TCPSocketListenOptions<unknown>) => {
      const handleOpen = how.socket.open;
      const socket: typeof how.socket = {
        ...how.socket,
        open(socket) {
          Object.defineProperty(socket, "remoteAddress", { value: place.address });
          return handleOpen?.(socket);
        },
      };
      return listen({ ...how, socket });
    };
    Bun.listen = listenFrom as typeof listen;
    try {
      return openRoom(options);
    } finally {
      Bun.listen = listen;
    }
  };
}

// --- 3. Text and names -------------------------------------------------------------------------

describe("text", () => {
  const CONTROLS = times(0xa0, (code) => String.fromCharCode(code)).filter((character) =>
    /[^\P{Cc}\t]/u.test(character),
  );

  test.each([
    ["controls but the tab", `a${CONTROLS.join("")}\tb`, "a\tb"],
    ["an escape sequence, but its letters", "\u001b[31mred\u009b0m", "[31mred0m"],
    ["line separators", "a\u2028\u2029\u0085b", "ab"],
    ["direction", "a\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "a"],
    ["byte order marks", "\ufeffa\ufeffb", "ab"],
    ["interlinear annotations", "a\ufff9b\ufffac\ufffbd", "abcd"],
    ["tags", "a\u{e0001}\u{e0041}\u{e007f}b", "ab"],
    ["the fifth mark on a letter", `a${"\u0301\u0302".repeat(99)}b`, "a\u0301\u0302\u0301\u0302b"],
    ["marks with joiners", `a${"\u0301\u200d".repeat(9)}b`, "a\u0301\u200d\u0301\u200db"],
    ["marks with the invisible", `a${"\u0301\u034f".repeat(9)}b`, "a\u0301\u034f\u0301\u034fb"],
    ["marks with format controls", `a${"\u0301\u070f".repeat(9)}`, "a\u0301\u070f\u0301\u070f"],
    ["marks over marks with a width", "\u0301\u0903".repeat(9), "\u0301\u0903".repeat(4)],
    ["the fifth enclosing mark", `a${"\u20dd".repeat(9)}`, `a${"\u20dd".repeat(4)}`],
    ["the fifth vowel of Hangul", `가${"\u1161".repeat(9)}b`, `가${"\u1161".repeat(4)}b`],
  ])("loses %s", (_, sent, shown) => {
    expect(cleanText(sent)).toBe(shown);
  });

  const STAYS = `plain text,  with two  blanks and a\ttab /👩🏽‍🚀 👨‍👩‍👧‍👦 ❤️ 1️⃣ 🏳️‍🌈 🇩🇪/می‌روم/क्‍ष श्री ज़ेंडाया/
    လျှို့ဝှက်/שָׁלוֹם/Tiếng Việt, é ê\u0323/བསྒྲུབས/漢\u{e0100}字`;
  test.each(STAYS.split(/\/\s*/))("stays as it is: %j", (text) => {
    expect(cleanText(text)).toBe(text);
  });
});

describe("a name", () => {
  const join = (name: string, ...taken: string[]) => {
    const room = new Room();
    for (const [clientId, name] of taken.entries()) apply(room, { type: "join", clientId, name });
    const outcome = apply(room, { type: "join", clientId: 99, name });
    return outcome && "refused" in outcome ? outcome.refused : "welcome";
  };

  const ALL_THE_WORLD = `
    Zoë Øyvind Łukasz Þórdís Ağaoğlu İpek Çınar Győző Đorđe Nguyễn Trần Ştefan Ñusta Āria Ǹjídékà Ọláolú
    Ɛfua Ŋaaba Алиса7 Юрий Їжак Ђорђе Ғабит Өнөр Ελένη Άννα Πλάτων Արամ Գոհար თამარ נועם אליס שָׂרָה
    محمد أحمد فاطمه پریسا ژاله ރަޝީދު राम कृष्ण श्री ज़ेंडाया সুমন ਗੁਰਪ੍ਰੀਤ પ્રિયા ଜଗନ୍ନାଥ தமிழ் శ్రీ ಕಾವ್ಯ
    ശ്രീജ සුනිල් สมชาย นิ่ม ນາງ ဖြိုး မျိုး သူရ កុសល ចាន់ སྒྲོལ བསྟན አበበ ሰላም 小明 王芳 佐々木 たろう
    マリー ハナコ 山田たろう 김철수 金민지 ㄋㄚㄋㄚ ᏣᎳᎩ ᐃᓄᒃ ⴰⵎⴰⵢⴰⵙ ߒߞߏ ꓡꓲꓢꓴ ᠪᠠᠲᠤ ꦱꦫꦶ ᱥᱟᱱ 𞤀𞤣𞤤𞤢𞤥 7 x1 राम७ علی٣
    ශ්‍රී චන්ද්‍රිකා कर्‍हाडे علی‌رضا 𐓏𐓘𐓻 ᯅᯖᯂ ᨅᨔ ᜆᜄᜎᜓ ꚠꛁ 𖼐𖼕 ẹ̀kọ́ m̧ajel̗ G̃uasu a 7 𝒜lice ${"a".repeat(32)}`;
  test.each(ALL_THE_WORLD.trim().split(/\s+/))("is welcome in any language: %s", (name) => {
    expect(join(name)).toBe("welcome");
  });

  test.each([
    ["empty", ""],
    ["33 letters long", "a".repeat(33)],
    ["129 letters long, which nothing looks at", "a".repeat(129)],
    ["with blanks or punctuation", " ,two words,dot.ted,[x],*,-dash"],
    ["an emoji, or what bad UTF-8 becomes", "😀,\ufffd"],
    ["a mark alone, or a number that falls apart into a fraction", "\u0301,\u00bd"],
    ["invisible, or with something invisible", "\u3164,bo\u034fb,b\u001bob,bob\u200f,\ufeffbob"],
  ])("is none when it is %s", (_, names) => {
    for (const name of names.split(",")) expect(join(name)).toBe(NAME_RULE);
  });

  const MIXED_OR_ORNATE = `
    аlice Вob aλ яλ bob7я bօb b໐b bo७b 小明Bob たろうTaro aʼ aː bob\u02b9 بـوب bx\u0301\u0302\u0303b ка\u064bт राम\u0b3c
    ᴀlice bob\ua78c Ⲁⲛ T\u0335om O\u0338le A\u0366sa ab\u0363`;
  test.each(MIXED_OR_ORNATE.trim().split(/\s+/))("is refused as mixed or ornate: %s", (name) => {
    expect(join(name)).toBe(SCRIPT_RULE);
  });

  const SPELLINGS = `good good GOOD ｇｏｏｄ; Straße STRASSE strasse STRAẞE; Zoe\u0308 ZOË zoë;
    ΟΔΥΣΣΕΥΣ οδυσσευς; ශ්‍රී ශ්රී`; // the last one with and without a joiner
  test.each(rowsOf(SPELLINGS))("is taken in other spellings, too: %s", (row) => {
    const [held = "", ...others] = row.split(" ");
    for (const name of others)
      expect(join(name, held)).toBe(`* The name ${name.normalize("NFKC")} is taken.`);
  });

  // Each row is a name that is taken, and what must not get in while it is, for whatever reason.
  const LOOK_ALIKES = `
    alice aIice a1ice aliсe аlice Аӏісе ɑlice alıce aӏice alɩce Αlice aǀice ａlice 𝒂lice
    bob b0b B0B bоb bοb bօb ΒΟΒ ВОВ Ьоь Ƅoƅ b໐b b०b Ꮟob ᗷOᗷ ꓐꓳꓐ
    Tom ΤΟΜ ТОМ T0m Tοm Tоm ꓔꓳꓟ Torn ТОM, Torn Tom, mam rnarn marn rnam MAM
    Ill lll I1l 111 ӀӀӀ ΙΙΙ I11, user1 userI userl, 002 OO2 oo2
    Tim Ti\u0307m Tı\u0307m Tі\u0307m, jim j\u0307im ji\u0307m, naïve naїve NAÏVE nаїve
    Şule Șule, Doğan Doǧan, Ôto Ȏto, Ņina Ɲina, Įva ɭva, ÇECA ҪЕСА, ãp ᾶρ, Đuro Ðuro
    ३२८ ૩૨૮ 328, ٣٤٦ ۳۴۶ 346, ០០ 00 OO oo ०० ໐໐
    ΑΝΝΑ ANNA anna Anna, Сара Capa CAPA, nina ΝΙΝΑ, опоо oпoo oπoo οποο, пакот πακοτ
    Ες Եu, нос HOC`;
  test.each(LOOK_ALIKES.split(/,|\n    /).slice(1))("is refused as a look-alike: %s", (row) => {
    const [held = "", ...others] = row.trim().split(/\s+/);
    for (const name of others) {
      const looks = `* The name ${name.normalize("NFKC")} looks like one that is taken.`;
      const taken = looks.replace("looks like one that is taken", "is taken");
      expect([looks, taken, SCRIPT_RULE]).toContain(join(name, held));
    }
  });

  const DIFFERENT = `Lia-Ila Ian-Lan Iida-Lida İpek-Ipek Ali-All Вова-Bob Ян-Яна user1-user2 Marta-Marna
    Sam-5am Αννα-Ανα 王-玉`;
  test.each(DIFFERENT.split(/\s+/))("may differ so little from another one: %s", (pair) => {
    const [held = "", name = ""] = pair.split("-");
    expect(join(name, held)).toBe("welcome");
  });
});

// --- 4. The room -------------------------------------------------------------------------------

describe("the room", () => {
  const join = (clientId: number, name: string): RoomEvent => ({ type: "join", clientId, name });
  const say = (clientId: number, text: string): RoomEvent => ({ type: "say", clientId, text });
  const nick = (clientId: number, name: string): RoomEvent => ({ type: "nick", clientId, name });
  const leave = (clientId: number, reason = ""): RoomEvent => ({ type: "leave", clientId, reason });

  test("is what its events have made of it", () => {
    const rows: [event: RoomEvent, heard: string | null, people: string][] = [
      // Events of an unknown client change nothing.
      [say(1, "hello"), null, ""],
      [nick(1, "alice"), null, ""],
      [leave(1), null, ""],

      [join(1, "alice"), "* alice has joined the chat", "alice"],
      [join(1, "bob"), null, "alice"],
      [join(2, "ｂob"), "* bob has joined the chat", "alice bob"],
      [say(1, "hello"), "[alice] hello", "alice bob"],

      // One name, one person. Another case of one's own name is another name.
      [join(3, "ALICE"), null, "alice bob"],
      [nick(2, "Alice"), null, "alice bob"],
      [nick(1, "alice"), null, "alice bob"],
      [nick(1, "Alice"), "* alice is now called Alice", "Alice bob"],

      // A name is free when nobody has it any more, and so is what looks like it.
      [nick(1, "carol"), "* Alice is now called carol", "carol bob"],
      [join(3, "a1ice"), "* a1ice has joined the chat", "carol bob a1ice"],
      [leave(1), "* carol has left the chat", "bob a1ice"],
      [leave(1), null, "bob a1ice"],
      [leave(2, " (too slow)"), "* bob has left the chat (too slow)", "a1ice"],
    ];
    const room = new Room();
    for (const [event, heard, people] of rows) {
      const outcome = apply(room, event);
      const said = outcome && "heard" in outcome ? outcome.heard : null;
      const names = Array.from(room.people.values(), ({ name }) => name).join(" ");
      expect({ event, said, names }).toEqual({ event, said: heard, names: people });
    }
  });

  test("keeps nothing of a name that is gone", () => {
    const room = new Room();
    for (const name of ["mam", "Ill", "Straße", "Аӏісе"]) {
      apply(room, join(1, name));
      apply(room, nick(1, "someone"));
      apply(room, leave(1));
    }
    expect(room).toEqual(new Room());
  });
});

// --- 5. The protocol ---------------------------------------------------------------------------

describe("joining", () => {
  test("a newcomer gets the roster of those who are here now", async () => {
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    const rosterOf = async (name: string) => {
      const peer = await greeted(room);
      peer.send(`${name}\n`);
      return (await peer.line()).replace("* The room contains: ", "");
    };
    expect(await rosterOf("carol")).toBe("alice, bob");
    expect(await rosterOf("dave")).toBe("alice, bob, carol");
    bob.send("/quit\n");
    await alice.until("* bob has left the chat");
    expect(await rosterOf("erin")).toBe("alice, carol, dave");
    alice.send("/nick anna\n");
    await alice.until("* alice is now called anna");
    expect(await rosterOf("frank")).toBe("anna, carol, dave, erin");
    expect(await rosterOf("grace")).toBe("anna, carol, dave, erin, frank");
  });

  test("of 300 who join at once, each gets a roster of its own and hears of all later ones", async () => {
    const room = open();
    const names = times(300, (number) => "語".repeat(29) + (number + 100));
    const crowd = await Promise.all(names.map(() => greeted(room)));
    for (const [place, peer] of crowd.entries()) peer.send(`${names[place]}\n`);
    for (const [place, peer] of crowd.entries()) {
      const roster = (await peer.line()).match(/語+\d+/g) ?? [];
      const later = await peer.lines(names.length - 1 - roster.length);
      const others = [...roster, ...later.map((line) => line.split(" ")[1] ?? "")];
      expect(others.toSorted()).toEqual(names.toSpliced(place, 1));
    }
    expect(namesIn(room)).toEqual(names);
  });

  const HTTP = "POST / HTTP/1.1\r\nHost: x\r\n\r\nmallory\nhello\n";
  const FORGED = "2026-01-01 00:00:00 Server is shutting down";
  const LOOKS_TAKEN = "* The name a1ice looks like one that is taken.";
  const NOT_REGISTERED = "it gave a password for a name that is not registered";
  const logOf = (why: string) => why.slice("* ".length);
  test.each([
    ["bad UTF-8", Buffer.from([0xff, 0xfe, 10]), NAME_RULE, logOf(NAME_RULE)],
    ["controls", `"\u001b[31m\r${FORGED}\u2028\u202e\\\n`, NAME_RULE, NOT_REGISTERED],
    ["a zero byte", "b\0ob\n", NAME_RULE, logOf(NAME_RULE)],
    ["many letters", `${"b".repeat(500)}\n`, NAME_RULE, logOf(NAME_RULE)],
    ["much, and no newline", "x".repeat(2049), NAME_RULE, logOf(NAME_RULE)],
    ["an HTTP request", HTTP, NAME_RULE, logOf(NAME_RULE)],
    ["a look-alike", "a1ice\n", LOOKS_TAKEN, logOf(LOOKS_TAKEN)],
  ])("a first line with %s is refused, which only the log tells", async (_, bytes, why, logged) => {
    const { room, log } = openLogged();
    const alice = await enter(room, "alice");
    const mallory = await greeted(room);
    alice.send("a stranger hears nothing of this\n");
    await alice.ping();
    mallory.send(bytes);
    expect(await mallory.rest()).toEqual([why]);
    expect(log.slice(4)).toEqual([`Refused 127.0.0.1:PORT: ${logged}`]); // and not what it gave
    await enter(room, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
  });

  test("a TLS hello ends the connection, even if a newline and a name are in it", async () => {
    const { room, log } = openLogged();
    const alice = await enter(room, "alice");
    const hello = Buffer.from("\x16\x03\x01\x00\xf4\x01\x02\nmallory\nhello\n", "latin1");
    for (let size = 1; size < hello.length; size++) {
      const peer = await greeted(room);
      peer.send(hello.subarray(0, size));
      expect(await peer.rest()).toEqual([]);
      expect(log.at(-1)).toBe("Refused 127.0.0.1:PORT: it speaks TLS");
    }
    expect(await alice.ping()).toEqual([]);
  });

  test("a long name is not normalized, which would take time that grows with its square", async () => {
    const stranger = await greeted(open());
    const { normalize } = String.prototype;
    let longest = 0;
    String.prototype.normalize = function (...form: [string?]) {
      longest = Math.max(longest, this.length);
      return normalize.apply(this, form);
    };
    cleanups.push(() => (String.prototype.normalize = normalize));
    // Marks in descending order of their class take longest.
    stranger.send(`a${"\u0315\u0300\u05b0".repeat(600)}\n`);
    expect(await stranger.rest()).toEqual([NAME_RULE]);
    expect(longest).toBeLessThanOrEqual(128);
  });
});

describe.each(ALL_WAYS)("messages, %s", (_, openRoom) => {
  test("go to all but their sender, in one order", async () => {
    const room = openRoom();
    const names = called("user", 40);
    const crowd = await enterAll(room, ...names);
    for (const line of numbered(50)) for (const peer of crowd.slice(0, 5)) peer.send(`${line}\n`);

    const heard = crowd.slice(5).map((peer) => peer.lines(250));
    const [first = [], ...others] = await Promise.all(heard);
    for (const lines of others) expect(lines).toEqual(first);
    for (const [place, peer] of crowd.slice(0, 5).entries()) {
      const isOwn = (line: string) => line.startsWith(`[user${place}] `);
      expect(first.filter(isOwn)).toEqual(numbered(50, `user${place}`));
      expect(await peer.lines(200)).toEqual(first.filter((line) => !isOwn(line)));
    }
  });

  test("arrive complete and in order, 20,000 at once", async () => {
    const [alice, bob] = await enterAll(openRoom(), "alice", "bob");
    alice.send(toText(numbered(20_000)));
    expect(await bob.lines(20_000)).toEqual(numbered(20_000, "alice"));
  });
});

describe.each(BOTH_WAYS)("a FIN, %s", (_, openRoom) => {
  test("may come in one packet with the name and all lines", async () => {
    const room = openRoom();
    const alice = await enter(room, "alice");
    const bob = await greeted(room);
    bob.send("bob\nhi\n/who\n");
    bob.socket.shutdown();
    expect(await bob.rest()).toEqual(["* The room contains: alice", present("alice", "bob")]);
    const heard = ["* bob has joined the chat", "[bob] hi", "* bob has left the chat"];
    expect(await alice.lines(3)).toEqual(heard);
  });

  test("of a slow reader leaves it all that was said before, to the last byte", async () => {
    const [room, alice, bob] = await gather(openRoom(), "alice", "bob");
    const said = await lagBehind(room, alice, bob, 500_000);
    bob.socket.shutdown();
    expect(await alice.line()).toBe("* bob has left the chat");
    bob.socket.resume();
    expect(await bob.rest()).toEqual(said);
  });
});

describe("a line", () => {
  test("is the same however its bytes are cut up, and whatever they are", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    const random = randomNumbers(2);
    for (let round = 0; round < 40; round++) {
      const heard: string[] = [];
      const pieces = times(8, () => [
        Buffer.from(times(random(30), () => random(256))),
        Buffer.from(["é", "漢", "👍", "\u202e", " ", "\r", "\r\n", "\n\n", "\t"][random(9)] ?? ""),
        Buffer.from("x".repeat(random(12) === 0 ? 4080 + random(30) : 0)),
        Buffer.from(["\n", "\r\n", "", "\n\ufeff"][random(4)] ?? ""),
      ]).flat();
      // Commands are another matter. The last line is whole, and marks the end of the round.
      const bytes = Buffer.concat([...pieces, Buffer.from(`\nend ${round}\n`)]);
      for (const [at, byte] of bytes.entries()) if (byte === 0x2f) bytes[at] = 0x2e;

      let size = 0;
      for (let at = 0; at < bytes.length; at += size) {
        size = 1 + random(random(4) === 0 ? 5 : 2000);
        alice.send(bytes.subarray(at, at + size));
        heard.push(...(await bob.ping())); // so that the next piece comes in a packet of its own
      }
      while (heard.at(-1) !== `[alice] end ${round}`) heard.push(await bob.line());
      expect(heard).toEqual(readSimply(bytes));
    }
  });

  /** The lines that others hear of alice, by a reader that has all bytes: split, decode, clean. */
  function readSimply(bytes: Buffer): string[] {
    const lines = bytes.toString("latin1").split("\n").slice(0, -1);
    return lines.flatMap((line) => {
      const ofLine = Buffer.from(line.replace(/\r$/, ""), "latin1");
      const text = cleanText(ofLine.toString());
      return ofLine.length <= 4096 && text.trim() ? [`[alice] ${text}`] : [];
    });
  }

  test("is no message when it is blank or unfinished, and looks like nobody else's", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    alice.send("\n\r\n   \n\t\n\u001b\u0007\u202e\n* carol has left the chat\r[carol] hi\nhalf");
    alice.socket.shutdown();
    expect(await bob.line()).toBe("[alice] * carol has left the chat[carol] hi");
    expect(await bob.line()).toBe("* alice has left the chat");
  });

  test.each(["\n", "\r\n"])("may have 4096 bytes before %j, and not one more", async (ending) => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    const longest = "é".repeat(2048);
    alice.send(`${longest}${ending}${longest}b${ending}short${ending}`);
    expect(await bob.lines(2)).toEqual([`[alice] ${longest}`, "[alice] short"]);
    expect(await alice.line()).toBe(TOO_LONG);
  });

  test.each([
    ["in pieces", ["x".repeat(4097), "x".repeat(900), "\r", "\n"]],
    ["with a return at the limit", ["x".repeat(4096) + "\rhidden", "\n"]],
    ["of 9 MB", [...times(3, () => "x".repeat(3_000_000)), "\n"]],
  ])("that is too long, %s, is not sent, and the sender is told once", async (_, pieces) => {
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    for (const piece of pieces) {
      expect(room.memoryUsed).toBeLessThan(5_000);
      alice.send(piece);
      expect(await bob.ping()).toEqual([]);
    }
    alice.send("short\n");
    expect(await bob.line()).toBe("[alice] short");
    expect(await alice.line()).toBe(TOO_LONG);
    expect(await alice.ping()).toEqual([]);
  });
});

describe("commands", () => {
  test("are listed by /help, and explained when they are unknown; // says a slash", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    alice.send("/help\n");
    for (const usage of [
      "/help",
      "/who",
      "/nick NAME",
      "/msg NAME TEXT",
      "/register PASSWORD",
      "/password NEW",
      "/unregister",
      "/history N",
      "/since POSITION",
      "/quit",
      "//TEXT",
    ])
      expect(await alice.line()).toStartWith(`* ${usage} `);
    for (const command of ["/foo", "/", "/constructor", "/__proto__"]) {
      alice.send(`${command} bar\n`);
      expect(await alice.line()).toBe(`* Unknown command ${command}. Try /help.`);
    }
    alice.send("//etc/passwd\n///\n");
    expect(await bob.lines(2)).toEqual(["[alice] /etc/passwd", "[alice] //"]);
    for (const invisible of "\0\u200e\ufeff\x1b") {
      alice.send(`${invisible}/quit\n${invisible}//\n/${invisible}who\n`);
      expect(await bob.lines(2)).toEqual(["[alice] /quit", "[alice] //"]);
      expect(await alice.line()).toBe(present("alice", "bob"));
    }
  });

  test("/who names all in the order of the alphabet, whoever comes, goes and is renamed", async () => {
    const room = open();
    const asker = await enter(room, "asker");
    const whoAfter = async (news: string) => {
      await asker.until(news);
      asker.send("/WHO\n");
      return await asker.line();
    };
    const names = ["Zoë", "李", "a10", "Bob", "a1", "Ängström"] as const;
    const [zoe, li, , bob] = await enterAll(room, ...names);
    const joined = present("a1", "a10", "asker", "Ängström", "Bob", "Zoë", "李");
    expect(await whoAfter("* Ängström has joined the chat")).toBe(joined);
    bob.send("/nick zoe\n");
    const renamed = present("a1", "a10", "asker", "Ängström", "zoe", "Zoë", "李");
    expect(await whoAfter("* Bob is now called zoe")).toBe(renamed);
    zoe.socket.terminate();
    const left = present("a1", "a10", "asker", "Ängström", "zoe", "李");
    expect(await whoAfter("* Zoë has left the chat")).toBe(left);
    li.send("/nick a\n");
    const first = present("a", "a1", "a10", "asker", "Ängström", "zoe");
    expect(await whoAfter("* 李 is now called a")).toBe(first);
  });

  test("/nick gives another name, which everybody hears, or says why it does not", async () => {
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    alice.send("before\n/nick Ａnna\nafter\n");
    const heard = ["[alice] before", "* alice is now called Anna", "[Anna] after"];
    expect(await bob.lines(3)).toEqual(heard);
    expect(await alice.line()).toBe("* alice is now called Anna");
    await enter(room, "alice"); // the old name is free

    alice.send("/nick BOB\n/nick \n/nick Anna\n/nick two words\n/nick anna\n");
    expect((await alice.lines(6)).slice(1)).toEqual([
      "* The name BOB is taken.",
      "* Say it like this: /nick NAME",
      "* You are called Anna already.",
      "* The name two is not registered, so it has no password. Take it alone: /nick two",
      "* Anna is now called anna",
    ]);
  });

  test("/msg reaches two people, in its place among the other lines, and nobody else", async () => {
    const { room, log } = openLogged();
    const [alice, bob, carol] = await enterAll(room, "alice", "bob", "carol");
    alice.send("one\n/msg BOB  psst,  you \ntwo\n");
    expect(await bob.lines(3)).toEqual(["[alice] one", "[alice -> bob] psst,  you", "[alice] two"]);
    expect(await carol.lines(2)).toEqual(["[alice] one", "[alice] two"]);
    expect(await alice.line()).toBe("[alice -> bob] psst,  you");
    const logged = ["one", "two"].map((text) => `Received message from alice: ${text}`);
    expect(log.slice(-2)).toEqual(logged);

    alice.send("/msg alice note\n/msg b0b hi\n/msg bob\n");
    expect(await alice.line()).toBe("[alice -> alice] note");
    expect(await alice.line()).toBe("* Nobody here is called b0b."); // it only looks like bob
    expect(await alice.line()).toBe("* Say it like this: /msg NAME TEXT");
  });

  test("/quit gets what was said before, and nothing after it is heard", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    alice.send("/who\n/quit\nghost\n");
    expect(await alice.rest()).toEqual([present("alice", "bob")]);
    expect(await bob.line()).toBe("* alice has left the chat");
    expect(await bob.ping()).toEqual([]);
  });
});

describe("leaving", () => {
  test("1,000 leave at once, each with a last line: all are heard, and all get the end", async () => {
    jest.useFakeTimers(); // so that all leave in one flush, which waits for a millisecond at most
    const room = open();
    const witness = await enter(room, "witness");
    const leavers = await enterTogether(room, called("user", 500));
    leavers.push(...(await enterTogether(room, called("guest", 500))));
    for (const peer of leavers) {
      peer.countsOnly = true;
      peer.send("bye\n");
      peer.socket.shutdown();
    }
    await Promise.all(leavers.map((peer) => peer.ended.promise));
    witness.send("/who\n");
    const heard = await witness.until(present("witness"));
    for (const suffix of ["] bye", " has joined the chat", " has left the chat"])
      expect(heard.filter((line) => line.endsWith(suffix))).toHaveLength(1_000);
  });

  test("a late leaver still has a minute to read what is left", async () => {
    jest.useFakeTimers();
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    jest.advanceTimersByTime(59_500);
    bob.send("/quit\n");
    expect(await alice.line()).toBe("* bob has left the chat");
    await bob.ended.promise;
    jest.advanceTimersByTime(55_000);
    await enter(room, "carol");
    expect(await Promise.race([bob.closed.promise, "open"])).toBe("open");
    // Its half of the connection is still open, so only a reset can close it.
    jest.advanceTimersByTime(7_000);
    expect(await bob.closed.promise).toBeInstanceOf(Error);
  });

  test("by a FIN and a reset at once leaves nothing in memory", async () => {
    const room = open();
    const alice = await enter(room, "alice");
    const crowd = await enterTogether(room, called("user", 200));
    for (const peer of crowd) peer.send("hello\nhalf a line");
    for (const peer of crowd) peer.socket.shutdown();
    for (const peer of crowd) peer.socket.terminate();
    for (const _ of crowd) await alice.until(/ has left the chat/);
    await alice.ping();
    expect([namesIn(room), room.memoryUsed]).toEqual([["alice"], 0]);
    await enter(room, "user0"); // the names are free
  });
});

// --- 6. Slow, fast and many --------------------------------------------------------------------

const MIB = 1024 * 1024;

describe.each(ALL_WAYS)("a slow reader, %s", (_, openRoom) => {
  test("may lag behind by less than 1 MiB for long, and by more than that for ten seconds", async () => {
    jest.useFakeTimers();
    const [room, alice, bob, carol] = await gather(openRoom(), "alice", "bob", "carol");
    for (const bytes of [900_000, 3_000_000]) {
      const said = await lagBehind(room, alice, carol, bytes);
      jest.advanceTimersByTime(bytes < MIB ? 50_000 : 9_000);
      carol.socket.resume();
      expect(await carol.lines(said.length)).toEqual(said);
      expect(await bob.lines(said.length)).toEqual(said);
      expect(queued(room, "carol")).toBe(0);
    }

    await lagBehind(room, alice, carol, 3_000_000);
    jest.advanceTimersByTime(12_000);
    expect(await alice.line()).toBe("* carol has left the chat (too slow)");
    await bob.until("* carol has left the chat (too slow)");
    await stillServes(room, alice, bob);
  });

  test("is disconnected at 8 MiB, and the others lose nothing, even with another one", async () => {
    const room = openRoom();
    const [alice, carol, dave, bob] = await enterAll(room, "alice", "carol", "dave", "bob");
    const said = await lagBehind(room, alice, carol, MIB);
    dave.socket.pause(); // and will be the second one to be disconnected
    said.push(...(await lagBehind(room, alice, carol, 8 * MIB - 200_000)));
    expect(namesIn(room)).toContain("carol");
    expect(said.length).toBeGreaterThan(2_000);
    while (room.clients.length > 2) {
      const text = `${said.length} ${"x".repeat(4000)}`;
      alice.send(`${text}\n`.repeat(20));
      said.push(...times(20, () => `[alice] ${text}`));
      await alice.ping();
      expect(room.memoryUsed).toBeLessThan(20 * MIB);
    }
    const heard = await bob.lines(said.length + 2);
    expect(heard.filter((line) => line.startsWith("["))).toEqual(said);
    const leavers = heard.filter((line) => line.endsWith(" has left the chat (too slow)"));
    expect(leavers).toHaveLength(2);
  });
});

describe("a slow reader", () => {
  test("is not one who has kept up, when a single batch is larger than the limit", async () => {
    const [room, alice, bob] = await gather(open(), "a".repeat(32), "bob");
    bob.socket.pause();
    alice.send("x\n".repeat(200_000));
    while (!(queued(room, "bob") > MIB)) await alice.ping();
    expect(room.clients).toHaveLength(2);
  });

  test("gets no more private messages than 16 KiB from one sender, who is told", async () => {
    const [room, alice, bob, carol] = await gather(open(), "alice", "bob", "carol");
    await lagBehind(room, alice, carol, 1);
    const before = queued(room, "carol");
    for (let number = 0; number < 100; number++) {
      alice.send(`/msg carol ${number} ${"p".repeat(1000)}\n`);
      await alice.line();
    }
    expect(queued(room, "carol") - before).toBeWithin(16_000, 20_000);
    alice.send("/msg carol more\n");
    const refusal = "* Your private messages are not being read. This one was not sent.";
    expect(await alice.line()).toBe(refusal);

    // This is no matter of others, nor of the rest that alice has to say.
    bob.send("/msg carol and this\n");
    await bob.until("[bob -> carol] and this");
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");

    carol.socket.resume();
    const heard = await carol.until("[alice] hello");
    const numbers = heard.flatMap((line) => /^\[alice -> carol\] (\d+) /.exec(line)?.[1] ?? []);
    expect(numbers).toEqual(times(numbers.length, String));
    expect(heard).toContain("[bob -> carol] and this");
    alice.send("/msg carol again\n");
    expect(await alice.line()).toBe("[alice -> carol] again");
    expect(await carol.line()).toBe("[alice -> carol] again");
  });
});

/** Lines that a newcomer may say at once, at a rate of 10 lines a second. */
const NEWCOMER_LINES = 16;

describe("a fast sender", () => {
  test("is read from more slowly: a paste of 250 lines arrives complete and in order", async () => {
    jest.useFakeTimers();
    const [alice, bob] = await enterAll(open({ rate: 10 }), "alice", "bob");
    alice.send(toText(numbered(250)));
    const heard = await bob.lines(NEWCOMER_LINES); // two seconds' worth, less the cost of coming
    for (let second = 0; second < 23; second++) {
      expect(await bob.ping()).toEqual([]);
      for (let tick = 0; tick < 10; tick++) jest.advanceTimersByTime(100);
      heard.push(...(await bob.lines(10)));
    }
    jest.advanceTimersByTime(1000);
    heard.push(...(await bob.lines(4)));
    expect(heard).toEqual(numbered(250, "alice"));
    alice.send("after the paste\n");
    jest.advanceTimersByTime(1000);
    expect(await bob.line()).toBe("[alice] after the paste");
  });

  test.each(BOTH_WAYS)("that half-closes is heard to its last line, %s", async (_, openRoom) => {
    jest.useFakeTimers();
    const [alice, bob] = await enterAll(openRoom({ rate: 10 }), "alice", "bob");
    alice.send(toText(numbered(120)) + "half");
    alice.socket.shutdown();
    expect(await bob.lines(NEWCOMER_LINES)).toEqual(numbered(NEWCOMER_LINES, "alice"));
    expect(await bob.ping()).toEqual([]);
    await pass(11);
    const rest = numbered(120, "alice").slice(NEWCOMER_LINES);
    expect(await bob.lines(rest.length + 1)).toEqual([...rest, "* alice has left the chat"]);
    expect(await alice.rest()).toEqual([]);
  });

  test("holds up nobody, and loses what is unread by its reset", async () => {
    jest.useFakeTimers();
    const [alice, bob, carol] = await enterAll(open({ rate: 10 }), "alice", "bob", "carol");
    alice.send("flood\n".repeat(50_000));
    await bob.lines(NEWCOMER_LINES);
    carol.send("hi\n");
    expect(await bob.line()).toBe("[carol] hi");
    alice.socket.terminate();
    expect(await bob.line()).toMatch(/^\* alice has left the chat \(\d+ or more lines unread\)$/);
  });

  test.each([
    ["a flood of lines", "", "x".repeat(400) + "\n"],
    ["a line that never ends", "", "x"],
    ["a flood after /quit", "/quit\n", "x"],
  ])("with %s is not read from without end", async (_, first, piece) => {
    jest.useFakeTimers();
    const [room, alice, bob] = await gather(open({ rate: 10 }), "alice", "bob");
    alice.send(first);
    const megabyte = Buffer.alloc(1_000_000, piece);
    let sent = 0;
    for (let turn = 0; turn < 400 && sent < 200_000_000; turn++) {
      sent += Math.max(0, alice.socket.write(megabyte));
      await turns(1);
    }
    expect(sent).toBeLessThan(40_000_000);
    const carol = await enter(room, "carol");
    bob.send("hello\n");
    await carol.until("[bob] hello");
  });
});

describe("many people", () => {
  test("take little memory when 64 say 42 lines of 4 KB at once, and nobody is cut off", async () => {
    const server = await serve("--rate", "0", "--quiet");
    const names = called("user", 64);
    const crowd = await enterAll(server, ...names);
    const before = crowd.map((peer) => peer.total);
    // In rounds of less than may wait for a reader, however slow this machine is.
    const text = `${"x".repeat(4000)}\n`.repeat(14);
    const lengths = names.map((name) => text.length + 14 * `[${name}] `.length);
    const sum = lengths.reduce((all, length) => all + length, 0);
    for (const peer of crowd) peer.countsOnly = true;
    for (let round = 1; round <= 3; round++) {
      for (const peer of crowd) peer.send(text);
      const totals = lengths.map((own, place) => (before[place] ?? 0) + round * (sum - own));
      const hasAll = (peer: Peer, place: number) =>
        !peer.isOpen || peer.total >= (totals[place] ?? 0) || undefined;
      await Promise.all(crowd.map((peer, place) => peer.when(() => hasAll(peer, place))));
      expect(crowd.map(({ total }) => total)).toEqual(totals);
    }
    expect(memory(server.pid, "VmHWM")).toBeLessThan(150 * 1024);
  });

  test("speaking in the same moment make no batch of more than 256 KiB", async () => {
    const room = open();
    const reader = await enter(room, "reader");
    const crowd = await enterTogether(room, called("user", 40));
    await reader.ping();
    const sizes: number[] = [];
    for (const { socket } of room.clients) {
      const write = socket.write.bind(socket);
      socket.write = (bytes: string | Bun.BufferSource, start = 0, length = 0) => {
        sizes.push(length);
        return write(bytes as Buffer, start, length);
      };
    }
    for (const peer of crowd) peer.send(`${"x".repeat(4000)}\n`.repeat(4)); // 640 KB in all
    for (let line = 0; line < 160; line++) await reader.line();
    expect(Math.max(...sizes)).toBeWithin(256 * 1024, 261 * 1024);
  });

  test("get long answers that they ask for at once, some a turn, and talk goes on", async () => {
    jest.useFakeTimers(); // a slow machine would end a turn early
    const room = open();
    const names = times(250, (number) => "語".repeat(29) + (number + 100));
    const [speaker, ...askers] = await enterTogether(room, names);
    for (const asker of askers) asker.send("/who\n/who\n/who\n"); // 6 MB for each round of answers
    speaker?.send("hello\n");
    const answersBefore: number[] = [];
    for (const asker of askers) {
      const isAnswer = (line: string) => line.includes(" people are here: ");
      const answers = (await asker.until(/hello$/)).filter(isAnswer).length;
      answersBefore.push(answers);
      for (let missing = 3 - answers; missing > 0; missing--)
        await asker.until(/ people are here: /);
    }
    expect(Math.min(...answersBefore)).toBe(0);
    expect(Math.max(...answersBefore)).toBe(1);
  });

  test("that do not read their answers fill 256 MiB; then the greediest is cut off first", async () => {
    const room = open();
    const witness = await enter(room, "witness");
    const crowd = await enterTogether(room, called("greedy", 60));
    for (const peer of crowd) {
      peer.socket.pause();
      peer.send("/help\n".repeat(60_000)); // with answers of 300 bytes
    }
    let most = 0;
    for (let gone = 0; gone < 10;) {
      if ((await witness.line()).endsWith(" has left the chat (too slow)")) gone++;
      most = Math.max(most, room.memoryUsed);
    }
    expect(most).toBeWithin(200 * MIB, 260 * MIB);
    await witness.ping();
    for (const peer of crowd) peer.socket.terminate();
    while (room.clients.length > 1) await witness.line();
    expect(room.memoryUsed).toBe(0);
  });
});

// --- 7. Budgets and addresses ------------------------------------------------------------------

describe("a budget", () => {
  /** Opens a room that limits addresses, as on a network, and counts what is said there. */
  function openCounted(options: Partial<ServerOptions> = {}) {
    const said: string[] = [];
    const room = open({
      rate: 10,
      maxPerAddress: 64,
      log: (event) => said.push(/^Received message from (\w+):/.exec(event)?.[1] ?? ""),
      ...options,
    });
    const count = (prefix: string) => said.filter((name) => name.startsWith(prefix)).length;
    return { room, count };
  }

  /** So many enter, and say 400 lines each. */
  async function flood(room: Server, people: number, prefix: string): Promise<Peer[]> {
    const crowd = await enterTogether(room, called(prefix, people));
    for (const peer of crowd) peer.send("spam\n".repeat(400));
    await Promise.all(crowd.map((peer) => peer.when(() => peer.isSent || undefined)));
    await turns(50);
    return crowd;
  }

  test("is charged for a line by its length", async () => {
    jest.useFakeTimers();
    const [alice, bob] = await enterAll(open({ rate: 10 }), "alice", "bob");
    jest.advanceTimersByTime(30_000);
    const lines = times(30, (number) => `${number} `.padEnd(4096, "x"));
    alice.send(toText(lines));
    const heard = await bob.lines(11); // of nine short lines each, where there is credit for 100
    expect(await bob.ping()).toEqual([]);
    await pass(8);
    heard.push(...(await bob.lines(8)));
    expect(heard).toEqual(lines.slice(0, 19).map((line) => `[alice] ${line}`));
  });

  test("is charged for an answer by its size", async () => {
    jest.useFakeTimers();
    const room = open({ rate: 10 });
    const first = await enter(room, "first");
    await enterTogether(room, called("x".repeat(29), 499));
    const witness = await enter(room, "witness");
    await first.until("* witness has joined the chat");
    jest.advanceTimersByTime(30_000);
    first.send("/who\n".repeat(100));
    // 34 bytes a name make 17 KB: about four short lines' worth, and one for the asking.
    for (const answer of await first.lines(19))
      expect(answer).toStartWith("* 501 people are here: ");
    const before = first.total;
    for (let round = 0; round < 8; round++) await witness.ping();
    await turns(200);
    expect(first.total - before).toBeLessThan(4 * 17_000);
  });

  test("is common to all connections of one address, and none of them waits for ever", async () => {
    jest.useFakeTimers();
    const { room, count } = openCounted();
    await flood(room, 10, "mallory");
    expect(count("mallory")).toBe(10 * NEWCOMER_LINES);
    const honest = await enter(room, "honest");
    await pass(20);
    honest.send("hello\n");
    for (let second = 0; count("honest") === 0; second++) {
      expect(second).toBeLessThan(3);
      await pass(1);
    }
    await pass(10);
    // Ten seconds' worth at once, and 40 lines a second.
    expect(count("mallory")).toBeWithin(20 * 40, 400 + 33 * 40);
  });

  test("of an address is not renewed by leaving and coming back", async () => {
    jest.useFakeTimers();
    const { room, count } = openCounted();
    const crowd = await flood(room, 10, "mallory");
    await pass(20);
    for (const peer of crowd) peer.socket.terminate();
    await pass(1); // nobody of that address is here
    await flood(room, 10, "again");
    await pass(3);
    // 40 short lines' worth for coming are owed first.
    expect(count("again")).toBeWithin(1, 4 * 40);
  });

  test("is common to all people, so that a reader keeps up with any number of them", async () => {
    jest.useFakeTimers();
    const { room, count } = openCounted({ rate: 1000, maxPerAddress: undefined });
    const quiet = await enter(room, "quiet");
    quiet.countsOnly = true;
    const crowd = await enterTogether(room, called("user", 40));
    for (const peer of crowd) {
      peer.countsOnly = true;
      peer.send(`${"x".repeat(4096)}\n`.repeat(60));
    }
    await pass(2);
    // Two seconds' worth at once, of 768 KiB, and what has been earned since.
    const linesPerSecond = (768 * 1024) / 4096;
    const before = count("user");
    expect(before).toBeWithin(2 * linesPerSecond, 4.5 * linesPerSecond);
    quiet.send("hello\n"); // no more than a share of it, so it need not wait
    await turns(100);
    expect(count("quiet")).toBe(1);
    await pass(4);
    expect(count("user") - before).toBeWithin(3 * linesPerSecond, 4.5 * linesPerSecond);
  });

  test("of the room is spent by what is heard: of a byte that is not UTF-8 three are", async () => {
    jest.useFakeTimers();
    const { room, count } = openCounted({ rate: 1000, maxPerAddress: undefined });
    for (const peer of await enterTogether(room, called("user", 10))) {
      peer.countsOnly = true;
      peer.send(
        Buffer.from(toText(times(60, () => "x".repeat(4096))).replaceAll("x", "\xff"), "latin1"),
      );
    }
    await pass(2);
    const linesPerSecond = (768 * 1024) / (3 * 4096);
    expect(count("user")).toBeWithin(2 * linesPerSecond, 4.5 * linesPerSecond);
  });

  test("is everybody's own where addresses are not limited, and there is none at rate 0", async () => {
    jest.useFakeTimers();
    const loopback = openCounted({ maxPerAddress: undefined });
    await flood(loopback.room, 40, "mallory");
    expect(loopback.count("mallory")).toBe(40 * NEWCOMER_LINES);
    const unlimited = openCounted({ rate: 0 });
    const crowd = await flood(unlimited.room, 30, "mallory");
    for (const peer of crowd) await peer.ping();
    expect(unlimited.count("mallory")).toBe(30 * 400);
  });

  const WAYS = [...BOTH_WAYS, BY_WEBSOCKET];
  test("greets nobody in vain: who waits and goes leaves the place to the next one", async () => {
    jest.useFakeTimers();
    for (const openRoom of [open, openTls, openForBrowsers]) {
      const room = openRoom({ rate: 10, maxPerAddress: 40 });
      const crowd = await Promise.all(times(30, () => Peer.connect(room)));
      for (const peer of crowd.slice(0, 20)) expect(await peer.line()).toBe(WELCOME);
      for (const peer of crowd.slice(20)) {
        peer.send(openRoom === openForBrowsers ? "" : "unfinished");
        peer.finish();
        peer.socket.end();
      }
      await turns(50);
      const late = await Peer.connect(room);
      await turns(50);
      jest.advanceTimersByTime(1000);
      expect(await late.line()).toBe(WELCOME);
    }
  });

  test.each(WAYS)("lets twenty arrive at once, then one a second, %s", async (_, openRoom) => {
    jest.useFakeTimers();
    const room = openRoom({ rate: 10, maxPerAddress: 64 });
    const crowd = await Promise.all(times(24, () => Peer.connect(room)));
    for (const peer of crowd.splice(0, 20)) expect(await peer.line()).toBe(WELCOME);
    for (const [number, peer] of crowd.entries()) peer.send(`late${number}\n`);
    for (const [number, peer] of crowd.entries()) {
      await turns(200);
      // Under TLS they do not even shake hands before.
      const isHeard = ({ total, isSecured }: Peer) => total > 0 || isSecured;
      expect(crowd.map(isHeard)).toEqual(crowd.map((_, place) => place < number));
      jest.advanceTimersByTime(1000);
      expect(await peer.line()).toBe(WELCOME);
      expect(await peer.line()).toStartWith("* The room contains: ");
    }
  });
});

describe("places", () => {
  test.each([
    ["in a full room", { maxClients: 2 }, FULL],
    ["for one address", { maxPerAddress: 2 }, TOO_MANY],
  ])("that are missing %s are reported, and taken when they are free", async (_, options, why) => {
    for (const [, openRoom] of ALL_WAYS) {
      const { room, log } = openLogged(options, openRoom);
      const [alice, bob] = await enterAll(room, "alice", "bob");
      const carol = await Peer.connect(room);
      carol.send("carol\nhello\n");
      expect(await carol.rest()).toEqual([why]);
      expect(log.at(-1)).toBe(`Refused 127.0.0.1:PORT: ${why.slice(2)}`);
      carol.socket.end();
      bob.socket.end();
      expect(await alice.line()).toBe("* bob has left the chat");
      await enter(room, "dave");
      expect(await alice.line()).toBe("* dave has joined the chat");
    }
  });

  test("are not taken by the refused, however many they are and stay", async () => {
    const room = open({ maxClients: 10, maxPerAddress: 5 });
    const crowd = await Promise.all(times(60, () => Peer.connect(room)));
    const first = await Promise.all(crowd.map((peer) => peer.lineOrEnd()));
    expect(first.filter((line) => line === WELCOME)).toHaveLength(5);
    expect(first.filter((line) => line === TOO_MANY).length).toBeGreaterThanOrEqual(32);
    const other = { host: "127.0.0.1", port: room.port, localAddress: "127.0.0.2" };
    const newcomer = createConnection(other);
    expect(`${(await once(newcomer, "data"))[0]}`).toBe(`${WELCOME}\n`);
    newcomer.destroy();
  });

  test("are free again, however a connection has ended", async () => {
    const room = open({ maxClients: 22, maxPerAddress: 22 });
    const alice = await enter(room, "alice");
    const comeAndGo = async (number: number) => {
      const peer = await greeted(room);
      const name = number % 3 > 0 ? `guest${number}` : "";
      peer.send(name && `${name}\nhello\n`);
      if (name) await peer.line();
      if (number % 2 > 0) peer.socket.terminate();
      else peer.send(name ? "/quit\n" : "\n");
      await peer.ended.promise;
      peer.socket.terminate();
    };
    for (let wave = 0; wave < 10; wave++) {
      await Promise.all(times(20, comeAndGo));
      for (let left = 0; left < 13; left++) await alice.until(/ has left the chat$/);
    }
    expect([namesIn(room), room.memoryUsed]).toEqual([["alice"], 0]);
  });

  test("are lost by a stranger who gives no name within a minute", async () => {
    jest.useFakeTimers();
    const { room, log } = openLogged({ maxClients: 3 });
    const silent = await greeted(room);
    const endless = await greeted(room);
    endless.send("alice");
    jest.advanceTimersByTime(59_000);
    const late = await greeted(room);
    jest.advanceTimersByTime(2_000);
    const none = "You gave no name within a minute.";
    const unfinished = "Your name did not end with a newline within a minute.";
    expect(await silent.rest()).toEqual([`* ${none}`]);
    expect(await endless.rest()).toEqual([`* ${unfinished}`]);
    const refused = [none, unfinished].map((why) => `Refused 127.0.0.1:PORT: ${why}`);
    expect(log.slice(-2)).toEqual(refused);
    late.send("bob\n");
    expect(await late.line()).toBe("* The room contains: ");

    // Their half of the connections is still open, so only a reset can close them.
    jest.advanceTimersByTime(6_000);
    expect(await silent.closed.promise).toBeInstanceOf(Error);
    await enter(room, "carol");
  });

  const LOOPBACK = ["127.0.0.1", "localhost", "LOCALHOST", "::ffff:127.0.0.1"];
  test.each(["0.0.0.0", ...LOOPBACK])(
    "are 64 for one address, and unlimited on a loopback: %s",
    async (host) => {
      const room = open({ host });
      const crowd = await Promise.all(times(70, () => Peer.connect(room)));
      const first = await Promise.all(crowd.map((peer) => peer.line()));
      const count = LOOPBACK.includes(host) ? 70 : 64;
      expect(first.filter((line) => line === WELCOME)).toHaveLength(count);
      expect(first.filter((line) => line === TOO_MANY)).toHaveLength(70 - count);
    },
  );

  const KEYS = `
    127.0.0.1 = 127.0.0.1; ::ffff:127.0.0.1 = 127.0.0.1; ::FFFF:192.0.2.7 = 192.0.2.7;
    2001:db8:1:2:3:4:5:6 = 2001:db8:1:2; 2001:db8:1:2::6 = 2001:db8:1:2; 2001:db8::6 = 2001:db8:0:0;
    2001:db8::1:2:3:4:5 = 2001:db8:0:1; ::1 = 0:0:0:0; fe80::1%eth0 = fe80:0:0:0`;
  test.each(rowsOf(KEYS))("are counted by address: %s", (row) => {
    const [host = "", key] = row.split(" = ");
    expect(addressKey(host)).toBe(`${key}`);
  });
});

// --- 8. Shutdown -------------------------------------------------------------------------------

describe.each(ALL_WAYS)("shutdown, %s", (_, openRoom) => {
  test("tells everybody, closes, and leaves the port free at once", async () => {
    const [room, alice, bob] = await gather(openRoom(), "alice", "bob");
    const stranger = await greeted(room);
    const stopped = room.stop();
    for (const peer of [alice, bob, stranger]) {
      expect(await peer.rest()).toEqual([SHUTDOWN]);
      peer.socket.end();
    }
    await stopped;
    await enter(openRoom({ port: room.port }), "alice");
  });

  test("under load delivers all that was sent before, to everybody", async () => {
    const room = openRoom();
    const crowd = await enterAll(room, ...called("user", 30));
    for (const peer of crowd) peer.send(toText(numbered(100)));
    const stopped = room.stop();
    for (const peer of crowd) {
      const lines = await peer.rest();
      expect(lines).toHaveLength(29 * 100 + 1);
      expect(lines.at(-1)).toBe(SHUTDOWN);
      peer.socket.end();
    }
    await stopped;
  });

  test("sends a slow reader's queue to its end", async () => {
    const [room, alice, carol] = await gather(openRoom(), "alice", "carol");
    const said = await lagBehind(room, alice, carol, 1024 * 1024 - 4100);
    // Now to the very byte: the notice of the shutdown does not fit any more.
    const text = "z".repeat(MIB - queued(room, "carol") - "[alice] \n".length);
    alice.send(`${text}\n`);
    await alice.ping();
    expect(queued(room, "carol")).toBe(MIB);
    const stopped = room.stop();
    expect(await alice.rest()).toEqual([SHUTDOWN]);
    carol.socket.resume();
    expect(await carol.rest()).toEqual([...said, `[alice] ${text}`, SHUTDOWN]);
    for (const peer of [alice, carol]) peer.socket.end();
    await stopped;
  });

  test("is not held up by a flood that is held back, whose sender is told of the loss", async () => {
    jest.useFakeTimers();
    const [room, alice, bob] = await gather(openRoom({ rate: 10 }), "alice", "bob");
    alice.send("flood\n".repeat(50_000));
    await bob.lines(NEWCOMER_LINES);
    for (const peer of [alice, bob]) void peer.ended.promise.then(() => peer.socket.shutdown());
    expect(await timeToStop(room)).toBeLessThan(2_000); // the deadline
    expect(await bob.rest()).toEqual([SHUTDOWN]);
    expect(await alice.rest()).toEqual(["* Your last lines came too late: 100 or more.", SHUTDOWN]);
  });
});

/** Stops a room. Resolves with the ms of fake time that it takes. */
async function timeToStop(room: Server): Promise<number> {
  let isStopped = false;
  let waited = 0;
  const stopping = room.stop().then(() => (isStopped = true));
  for (; !isStopped && waited < 10_000; waited += 5) {
    jest.advanceTimersByTime(5);
    await turns(1);
  }
  await stopping;
  return waited;
}

describe.each(BOTH_WAYS)("shutdown in a line, %s", (_, openRoom) => {
  test("is not held up by an endless line, behind which lines may be lost", async () => {
    jest.useFakeTimers();
    const room = openRoom({ rate: 10 });
    const alice = await enter(room, "alice");
    alice.send(`${"x".repeat(9_000_000)}\nhello\n`);
    while (room.memoryUsed < 4096) await turns(1);
    await turns(50);
    void alice.ended.promise.then(() => alice.socket.shutdown());
    expect(await timeToStop(room)).toBeLessThan(2_000); // the deadline
    expect(await alice.rest()).toEqual(["* Your last lines may have come too late.", SHUTDOWN]);
  });
});

describe("shutdown", () => {
  test("does not wait longer than two seconds for those who never read or close", async () => {
    jest.useFakeTimers();
    const room = open();
    const alice = await enter(room, "alice");
    alice.socket.pause();
    expect(await timeToStop(room)).toBeWithin(1_900, 2_100);
  });

  test("does not wait for those who never stop sending", async () => {
    const room = open();
    const alice = await enter(room, "alice");
    const flood = () => {
      if (alice.socket.write("flood\n".repeat(100)) >= 0) setImmediate(flood);
    };
    flood();
    void alice.ended.promise.then(() => alice.socket.terminate());
    await room.stop();
  });
});

// --- 9. The server program ---------------------------------------------------------------------

describe.concurrent("bun server.ts", () => {
  test("logs who comes, what is said and who goes, with the local time", async () => {
    const server = await serve();
    const alex = await enter(server, "Alex");
    alex.send("Hello\r\x1b[31m everyone!\u2028\n/nick Sasha\n/msg Sasha a secret\n");
    alex.socket.shutdown();
    await server.out.until(/Removing user/);
    server.child.kill("SIGTERM");
    const { code, out } = await server.result();
    expect(code).toBe(0);
    const lines = out.trimEnd().split("\n");
    for (const line of lines) expect(line).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S/);
    expect(lines.map((line) => line.slice(20).replace(/:\d{4,5}\b/, ":PORT"))).toEqual([
      "Server is running on 127.0.0.1:PORT, waiting for connections...",
      "New connection from 127.0.0.1:PORT",
      "User Alex has joined the chat. From 127.0.0.1:PORT",
      "Received message from Alex: Hello[31m everyone!",
      "User Alex is now called Sasha.",
      "Removing user: Sasha from clients",
      "Server is shutting down",
    ]);
  });

  test.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)("ends well by %s", async (signal) => {
    const server = await serve("--quiet");
    const alex = await enter(server, "Alex");
    alex.send("hello\n");
    await alex.ping();
    server.child.kill(signal);
    expect(await alex.rest()).toEqual([SHUTDOWN]);
    alex.socket.end();
    const { code, out, err } = await server.result();
    expect([code, err]).toEqual([0, ""]);
    expect(out).toMatch(/^.*Server is running on .*\n.*Server is shutting down\n$/);
  });

  test("ends at once by a second signal", async () => {
    const server = await serve();
    const alice = await enter(server, "alice");
    alice.socket.pause(); // so that the first signal leaves it waiting
    server.child.kill("SIGTERM");
    await server.out.until("Server is shutting down");
    server.child.kill("SIGTERM");
    expect((await server.result()).code).toBe(143);
  });

  test("passes its options on to the room", async () => {
    const limits = ["--max-clients", "3", "--max-per-address", "2", "--rate", "0"];
    const server = await serve(...limits);
    const [alice] = await enterAll(server, "alice", "bob");
    expect(await (await Peer.connect(server)).rest()).toEqual([TOO_MANY]);
    alice.send("/who\n".repeat(500));
    expect(await alice.lines(500)).toHaveLength(500);
    const small = await serve("--max-clients", "1");
    await enter(small, "alice");
    expect(await (await Peer.connect(small)).rest()).toEqual([FULL]);
  });

  const JUNK = `${folder}/junk`;
  const EMPTY = `${folder}/empty`;
  const { cert, key } = certificate;
  test.each([
    ["--port banana", 2, /^--port takes a number from 0 to 65535, not "banana"/],
    ["--port", 2, /^Option '--port <value>' argument missing/],
    ["--rate -1", 2, /^Option '--rate' argument is missing, or begins with -\./],
    ["--max-clients 0", 2, /^--max-clients takes a number from 1/],
    ["--max-per-address 0", 2, /^--max-per-address takes a number from 1/],
    ["--keep -1", 2, /^Option '--keep' argument is missing, or begins with -\./],
    ["--keep x", 2, /^--keep takes a number from 0 to 36500, not "x"/],
    ["--web x", 2, /^--web takes a number from 0 to 65535, not "x"/],
    ["--web 0 --web-origin chat.lan", 2, /^--web-origin takes a URL without a path, such as/],
    ["--web 0 --web-origin ftp://chat.lan", 2, /^--web-origin takes a URL without a path/],
    ["--web 0 --web-origin http://chat.lan/x", 2, /^--web-origin takes a URL without a path/],
    ["--web-origin http://chat.lan", 2, /^--web-origin and --metrics-token go together with --web/],
    ["--metrics-token abc", 2, /^--web-origin and --metrics-token go together with --web/],
    ["--web 0 --metrics-token=", 2, /^--metrics-token takes a token/],
    ["--foo", 2, /^Unknown option '--foo'/],
    ["foo", 2, /^Unexpected argument 'foo'/],
    ["--host 192.0.2.1", 1, /^This machine has no such address/],
    [`--tls-cert ${cert}`, 2, /^--tls-cert and --tls-key go together\. See/],
    ["--tls-key=", 2, /^--tls-cert and --tls-key go together\. See/],
    [`--tls-cert ${folder}/none --tls-key ${key}`, 1, /^The file .*\/none cannot be read\./],
    [`--tls-cert ${cert} --tls-key ${folder}/none`, 1, /^The file .*\/none cannot be read/],
    [`--tls-cert ${cert} --tls-key ${renewed.key}`, 1, /^The key does not belong to the cert/],
    [`--tls-cert ${JUNK} --tls-key ${key}`, 1, /^The certificate or the key is not in PEM/],
    [`--tls-cert ${cert} --tls-key ${EMPTY}`, 2, /empty file/],
  ])("with %s says in one line what is wrong, and exits with %d", async (options, code, reason) => {
    await Promise.all([Bun.write(JUNK, "no certificate\n"), Bun.write(EMPTY, "")]);
    const command = [process.execPath, "server.ts", "--port", "0", ...options.split(" ")];
    const result = await inPipe(command).result();
    expect([result.code, result.out]).toEqual([code, ""]);
    expect(result.err).toMatch(reason);
    expect(result.err.trimEnd().split("\n")).toHaveLength(1);
  });

  test("says that a port is in use, and leaves the other server alone", async () => {
    const { port } = await serve();
    for (const option of ["--port", "--web"]) {
      const ports = ["--port", "0", option, `${port}`];
      const second = inPipe([process.execPath, "server.ts", ...ports]);
      const err = `The port is in use: choose another one with ${option}.\n`;
      expect(await second.result()).toEqual({ code: 1, out: "", err });
    }
    await enter({ port }, "alice");
  });

  test("runs as ./server.ts, and shows its help and its version", async () => {
    const help = await inPipe(["./server.ts", "--help"]).result();
    expect(help.code).toBe(0);
    const options =
      "host port rate max-clients max-per-address tls-cert tls-key db keep operators web web-origin metrics-token quiet version";
    for (const option of options.split(" ")) expect(help.out).toContain(`  --${option} `);
    const { version } = await Bun.file(`${import.meta.dir}/package.json`).json();
    const shown = { code: 0, out: `bun-chat ${version}\n`, err: "" };
    expect(await inPipe(["./server.ts", "--version"]).result()).toEqual(shown);
  });

  /** Starts a server whose output goes to a command of bash; `type` writes to its descriptor 3. */
  async function serveInto(reader: string) {
    const command = `exec ${process.execPath} server.ts --port 0 --rate 0 > >(${reader})`;
    return await serveBy(["bash", "-c", `exec 3<&0; ${command}`]);
  }

  test("goes on, and ends by SIGTERM, when its standard output is closed", async () => {
    const server = await serveInto("head -n 1");
    const [alice, bob] = await enterAll(server, "alice", "bob");
    alice.send(toText(numbered(400)));
    expect(await bob.lines(400)).toEqual(numbered(400, "alice"));
    await stillServes(server, alice, bob);
    server.child.kill("SIGTERM");
    for (const peer of [alice, bob]) {
      await peer.until(SHUTDOWN);
      peer.socket.end();
    }
    expect([await server.child.exited, server.err.text]).toEqual([0, ""]);
  });

  test("leaves out and counts lines of a log that nobody reads, which takes little memory", async () => {
    const server = await serveInto("head -n 1; read -r -u 3; exec cat");
    const [alice, bob] = await enterAll(server, "alice", "bob");
    const text = `${"t".repeat(4000)}\n`.repeat(25);
    const talk = async (times: number) => {
      for (let time = 0; time < times; time++) {
        alice.send(text);
        await bob.lines(25);
      }
    };
    await talk(50);
    const before = memory(server.pid, "VmRSS");
    await talk(300);
    expect(memory(server.pid, "VmRSS") - before).toBeLessThan(24 * 1024);
    server.type("\n");
    // Only what is said after the reader has caught up is printed, so it is said until it is seen.
    while (!/\(\d+ lines are missing here: nobody read them in time\)/.test(server.out.text)) {
      alice.send("again\n");
      await bob.line();
    }
    await stillServes(server, alice, bob);
  });

  test("serves fewer when there are few file descriptors, says so, and never runs out", async () => {
    const command = `ulimit -n 128; exec ${process.execPath} server.ts --port 0`;
    const server = await serveBy(["bash", "-c", command]);
    await server.out.until("At most 64 clients: more would need more open files (ulimit -n).");
    const [alice, bob] = await enterAll(server, "alice", "bob");
    const crowd = await Promise.all(times(300, () => Peer.connect(server)));
    const first = await Promise.all(crowd.map((peer) => peer.lineOrEnd()));
    expect(first.filter((line) => line === WELCOME)).toHaveLength(62);
    expect(first.filter((line) => line === FULL).length).toBeGreaterThanOrEqual(30);
    // With none left the server would spin: `accept` fails, and the connection stays.
    expect(fs.readdirSync(`/proc/${server.pid}/fd`).length).toBeLessThan(128);
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    for (const peer of crowd) peer.socket.terminate();
    for (let greeting: string | null = null; greeting !== WELCOME;) {
      const late = await Peer.connect(server);
      greeting = await late.lineOrEnd();
      late.socket.terminate();
    }
    await stillServes(server, alice, bob);
  });

  test("ends in good order, with exit code 1, by an exception that nobody can explain", async () => {
    const fail = 'setTimeout(() => { throw new Error("on purpose") })';
    const code = `process.on("SIGUSR2", () => ${fail}); (await import("./server.ts")).main();`;
    const options = ["--port", "0", "--rate", "0"];
    const server = await serveBy([process.execPath, "--eval", code, "--", ...options]);
    const [alice, bob] = await enterAll(server, "alice", "bob");
    alice.send(toText(numbered(1000)));
    server.child.kill("SIGUSR2");
    expect(await bob.rest()).toEqual([...numbered(1000, "alice"), SHUTDOWN]);
    expect(await alice.rest()).toEqual([SHUTDOWN]);
    for (const peer of [alice, bob]) peer.socket.end();
    const { err, out, code: exitCode } = await server.result();
    expect(exitCode).toBe(1);
    expect(err).toContain("on purpose");
    expect(out).toContain("Server is shutting down");
  });
});

// --- 10. The client in a terminal --------------------------------------------------------------
// First what needs no terminal, as tables. Then what only a terminal can show.

const FAMILY = "👨‍👩‍👧"; // three people and two joiners: one character to a person
const FLAGS = "🇩🇪🇫🇷";

describe("the lines of the client", () => {
  test("are the same however their bytes are cut", () => {
    const random = randomNumbers(7);
    const whole = ["a", "\n", "é", "漢", FAMILY, "\r\n", "\n\n", "\ufeffx", "\u2028", "\x1b[0m"];
    const broken = [[0xff], [0xe6, 0xbc], [0xf0, 0x9f], [0xc0, 0x80], [0xed, 0xa0, 0x80]];
    const parts = [...whole.map((part) => Buffer.from(part)), ...broken.map(Buffer.from)];
    for (let round = 0; round < 300; round++) {
      const bytes = Buffer.concat(times(30, () => parts[random(parts.length)] ?? Buffer.alloc(0)));
      const split = splitLines(1000);
      const lines: string[] = [];
      for (let at = 0, next = 0; at < bytes.length; at = next) {
        next = at + 1 + random(4);
        lines.push(...split(bytes.subarray(at, next)));
      }
      lines.push(...split());
      const wanted = bytes.toString().split("\n").map(cleanTextOfClient);
      if (wanted.at(-1) === "") wanted.pop();
      expect(lines).toEqual(wanted);
    }
  });

  test("are cut at a limit, and the next line is whole", () => {
    const split = splitLines(10);
    for (let round = 0; round < 100; round++) expect(split(Buffer.from("abc"))).toEqual([]);
    expect(split(Buffer.from("abc\nnext\n"))).toEqual(["abcabcabca", "next"]);
    expect(split(Buffer.from(`\n${"x".repeat(11)}\nlast`))).toEqual(["", "x".repeat(10)]);
    expect(split()).toEqual(["last"]);
  });

  test("lose the same characters as those of the server", () => {
    for (let first = 0; first < 0x11_0000; first += 0x1000) {
      const characters = times(0x1000, (number) => `a${String.fromCodePoint(first + number)}`);
      expect(cleanTextOfClient(characters.join(""))).toBe(cleanText(characters.join("")));
    }
  });

  test.each([
    ["[bob] * carol has left the chat", { from: "bob" }],
    ["[bob -> Zoë] hi", { from: "bob", to: "Zoë" }],
    ["[می‌خواهم] hi", { from: "می‌خواهم" }], // with a joiner
    ["* bob has joined the chat", { who: "bob", did: "joined" }],
    ["* bob has left the chat (too slow)", { who: "bob", did: "left" }],
    ["* bob has left the chat (kicked by al: x)", { who: "bob", did: "left" }],
    ["* bob has entered the room", { who: "bob", did: "entered" }],
    ["* bob is now called Bill", { who: "bob", renamed: "Bill" }],
    ["* The room contains:", { roster: "" }],
    ["* 1 person is here: bob", { roster: " bob" }],
    ["* 12 people are here: bob", { roster: " bob" }],
  ])("mean what they say: %s", (text, parts) => {
    expect(classify(text)).toEqual({ text, ...parts });
  });

  const PLAIN = `* bob is now called Bill Gates; * a b has left the chat; [not a name] hi; [bob]hi;
    [${"a".repeat(65)}] hi`;
  test.each([...rowsOf(PLAIN), " [bob] hi"])("mean nothing else: %s", (text) => {
    expect(classify(text)).toEqual({ text });
  });
});

describe("wrapping", () => {
  test("loses no word, and lets no row begin at the left, whatever the text", () => {
    const random = randomNumbers(3);
    const parts = `a|word| |   |漢字|\t|${FAMILY}|\u00a0|\u3000|*|\u2800`.split("|");
    for (let round = 0; round < 700; round++) {
      const text = times(60, () => parts[random(parts.length)]).join("");
      const columns = 12 + random(40);
      const indent = 1 + random(columns >> 1);
      const blank = " ".repeat(indent);
      const [first = "", ...others] = wrapText(text, indent, indent, columns).split("\n");
      expect(others.filter((row) => !row.startsWith(blank))).toEqual([]);
      expect([first, ...others].join("").replace(/[ \t]+/g, "")).toBe(text.replace(/[ \t]+/g, ""));
      const shown = picture(`${blank}${[first, ...others].join("\r\n")}`, columns).text.split("\n");
      const atLeft = shown.filter((row) => row && !row.startsWith(blank));
      expect(atLeft.filter((row) => !/^[!-~]/.test(row))).toEqual([]); // only of a long ASCII word
    }
  });
});

describe("rows of what is typed", () => {
  test.each([
    ["abcdefghij|", ["abcdefghij", ""], 1, ""],
    ["abcdefghi|j", ["abcdefghij"], 0, "abcdefghi"],
    ["abcdefghij|k", ["abcdefghij", "k"], 1, ""],
    ["abcdefghi|漢", ["abcdefghi", "漢"], 1, ""],
    [`12345678${FLAGS}|x`, ["12345678🇩🇪", "🇫🇷x"], 1, "🇫🇷"],
    [`1234567${FAMILY}${FAMILY}|`, [`1234567${FAMILY}`, FAMILY], 1, FAMILY],
  ] as const)("%s", (marked, rows, row, before) => {
    const text = marked.replace("|", "");
    expect(cutRows(text, marked.indexOf("|"), 10)).toEqual({ rows: [...rows], row, before });
  });
});

describe("the editor", () => {
  const people = ["bob", "bill", "Boris"];

  /** What is in it after what is typed, keys such as `<left>`, and `{pastes}`; `|` is the cursor. */
  function edit(typed: string, editor = createEditor((before) => complete(before, people))) {
    for (const [, key, pasted, text = ""] of typed.matchAll(/<([a-z+]+)>|\{(.*?)\}|([^<{]+)/g)) {
      if (key === "enter") editor.enter(true);
      else if (key) editor.press(key);
      else editor.insert(pasted ?? text, pasted !== undefined);
    }
    return `${editor.text.slice(0, editor.cursor)}|${editor.text.slice(editor.cursor)}`;
  }

  // A row is what is typed, and what is in the editor then.
  const MOVING = `
    hello<left><left>X = helX|lo; ell<home>h<end>o<ctrl+a><ctrl+f><ctrl+e><ctrl+b> = hell|o;
    a<left><left><backspace><right><right><delete>b = ab|; a${FAMILY}b<left><left> = a|${FAMILY}b;
    a${FAMILY}b<home><right><right> = a${FAMILY}|b; a${FAMILY}b<left><backspace> = a|b;
    ${FAMILY}b<home><delete> = |b; ${FLAGS}<left> = 🇩🇪|🇫🇷; ${FLAGS}<backspace> = 🇩🇪|;
    ae\u0301<backspace>b = ab|; कि<left>x = x|कि; one two three<alt+b><ctrl+left><alt+d>X = one X| three;
    one two<home><alt+right><ctrl+right>! = one two!|; ab<home><ctrl+d> = |b; a<f><ctrl+x><escape>b = ab|`;
  const KILLING = `
    one two  three<ctrl+w><ctrl+y><ctrl+y> = one two  threethree|; one two  <ctrl+w> = one |;
    one two<left><ctrl+u> = |o; one two<home><alt+f><ctrl+k> = one|; one two<alt+backspace> = one |;
    one two<ctrl+w><ctrl+u><ctrl+y> = one |; a b<ctrl+w><ctrl+k><end><ctrl+y> = a b|;
    a b<ctrl+w><backspace><ctrl+y> = ab|; /register x<ctrl+w><ctrl+y> = /register |`;
  const HISTORY = `
    one<enter>two<enter><up><up><down> = two|; one<enter>two<enter><up><up><up><up><down> = two|;
    one<enter>two<enter><ctrl+p><ctrl+p><ctrl+n>! = two!|; one<enter>xyz<up><up><down> = xyz|;
    one<enter>hello world<home><up><down> = hello world|; hello<home><up><down> = |hello;
    a<enter>b<enter>c<up><up><down><down><down> = c|; a<enter>b<enter>b<enter><up><up> = a|;
    a<enter> <enter><enter><up> = a|; one<enter><up>X<enter><up><up> = one|`;
  const COMPLETING = `
    b<tab> = Boris: |; b<tab><tab> = bill: |; b<tab><tab><tab><tab> = Boris: |; x<tab><tab>y = xy|;
    b<tab><tab><shift+tab> = Boris: |; b<shift+tab> = bob: |; b me<home><right><tab> = Boris: | me;
    b me<home><right><tab><tab> = bill: | me; b<tab><backspace><backspace><tab><tab> = Boris: |`;
  test.each([MOVING, KILLING, HISTORY, COMPLETING].flatMap(rowsOf))("%s", (row) => {
    const [typed = "", wanted] = row.split(" = ");
    expect(edit(typed)).toBe(`${wanted}`);
  });

  test("keeps the last thousand lines", () => {
    const editor = createEditor(() => []);
    edit(numbered(1001).join("<enter>") + "<enter>", editor);
    expect(edit("<up>".repeat(1000), editor)).toBe("line 1|");
    expect(edit("<up><down>", editor)).toBe("line 2|");
  });

  const PASTED = `{/quit}; {/qu}it; it<home>{/qu}; a<enter>{/quit}<up><down>; {/quit}<ctrl+u><ctrl+y>;
    {/quit}<enter>/who<enter><up><up>`;
  const TYPED = `/quit; /msg bob {text}; {quit}<home>/; {/}<backspace>/quit; {/a}<enter>/b; {/}<backspace>;
    a<enter>{b}<up>`;
  test.each(rowsOf(`${PASTED}; ${TYPED}`))(
    "knows whether a line begins with a paste: %s",
    (row) => {
      const editor = createEditor(() => []);
      edit(row, editor);
      expect(editor.enter(true).isPasted).toBe(rowsOf(PASTED).includes(row));
      expect([editor.text, editor.cursor]).toEqual(["", 0]);
    },
  );

  const OFFERS = `
    b = Boris: |bill: |bob: |; BO = Boris: |bob: |; hi b = hi Boris |hi bill |hi bob |; x = ; //m = ; say /m = ;
    @b = @Boris |@bill |@bob |; hi @BI = hi @bill |; /msg  = /msg Boris |/msg bill |/msg bob |;
    /m = /msg |; /I = /ignore |; /h = /help |/history |; /u = /unregister |; /q = /quit |`;
  test.each(rowsOf(OFFERS))("offers %s", (row) => {
    const [typed = "", offers = ""] = row.split(/ = ?/);
    expect(complete(typed, people)).toEqual(offers.split("|").slice(0, -1));
  });

  test("offers the very name first", () => {
    const names = ["Willi", "willi6", "WILLIBALD"];
    expect(complete("willi", names)).toEqual(["Willi: ", "WILLIBALD: ", "willi6: "]);
    expect(complete("hi @WILLI6", names)).toEqual(["hi @willi6 "]);
    expect(complete("@willi", names)[0]).toBe("@Willi ");
  });
});

describe("a roster", () => {
  const roster = (names: readonly string[]) => classify(`* The room contains: ${names.join(", ")}`);

  test("that fits two rows is shown as it is, others are counted, sorted and cut", () => {
    const few = roster(["bob", "Alice", "carol"]);
    expect(shortenRoster(few, 40)).toBe(few.text);
    expect(shortenRoster({ text: "x".repeat(500) }, 40)).toBe("x".repeat(500));
    const many = roster(["Zoë", "bob", "Alice", "élan", ...called("x", 200)]);
    const begin = "* 204 people are here: Alice, bob, élan, x0, x1, ";
    expect(shortenRoster(many, 60)).toStartWith(begin);
    for (let columns = 40; columns < 200; columns++) {
      const text = shortenRoster(many, columns);
      const [, names = "", more] = /: (.*) and (\d+) more \(\/who shows all\)$/.exec(text) ?? [];
      expect(names.split(", ").length + Number(more)).toBe(204);
      const rows = wrapText(text.slice(2), 8, 8, columns).split("\n");
      expect(rows.length).toBeLessThanOrEqual(2);
      if (columns >= 80) expect(rows.join("").length).toBeGreaterThan(columns);
    }
  });
});

const BLANKS = "A name has no blanks. Its password is asked for.";
const NO_PASSWORD =
  "The name is registered: give its password in the environment, as CHAT_PASSWORD.";
const NO_REASON = "The server closed the connection: the name may be taken or not allowed.";
const MENU = `1. Join the chat
q. Leave the chat
2. Exit the program
Enter your choice: `;

describe("the menu", () => {
  test("speaks as it always has, and q in the chat comes back to it", async () => {
    const server = budgetChat();
    const alex = inTerminal(client(server.port));
    await alex.shows(`Connected to server.\n${MENU}|`);
    await alex.press("3\r", `Enter your choice: 3\nInvalid choice. Try again.\n${MENU}|`);
    await alex.press("1\r", "Enter your choice: 1\nEnter your username: |");
    const inRoom = "Joining the chat as Alex...\n* The room contains: bob, carol\nYou: ";
    await alex.press(" Alex \r", `Enter your username:  Alex\n${inRoom}|`);
    const left = "Leaving the chat...\nConnection closed.\n";
    await alex.press("Hello everyone!\rQ\r", `You: Hello everyone!\n${left}${MENU}|`);
    await alex.press("1\rAlex\r", `${inRoom}|`);
    await alex.press("q\r", `${left}${MENU}|`);
    alex.type("Q\r");
    await alex.ends(0, "Disconnecting from the server...\r\n");
    const [, ...said] = server.heard.text.split("joined: ");
    const round = /^Alex\n(Alex: Hello everyone!\n)?end of Alex\nclosed Alex\n/;
    expect(said.map((words) => round.test(words))).toEqual([true, true]);
  });

  test("is ended by an empty line, but not by a paste, with or without brackets", async () => {
    const alex = inTerminal(pacedClient({ blank: 50 }, budgetChat().port));
    await alex.shows(`${MENU}|`);
    const pasted = `${paste("one\r\r2\rq\r/quit\r")}two\r\r1\r`;
    await alex.press(pasted, "Enter your choice: 1\nEnter your username: |");
    await alex.press("\r", `Enter your username:\n${MENU}|`);
    alex.type("\r");
    await alex.ends(0, "Exiting the program.\r\n");
  });

  test("connects again when the server is gone, was reset, or comes back later", async () => {
    const server = budgetChat();
    const alex = inTerminal(client(server.port));
    await alex.shows(`${MENU}|`);
    server.drop();
    await alex.press("3\r", `Invalid choice. Try again.\n${MENU}|`);
    alex.type("1\rAlex\rone\rq\r");
    await server.heard.until("Alex: one\nend of Alex\nclosed Alex\n");
    await alex.shows(`${MENU}|`);
    server.stop();
    const words = `Could not connect to 127.0.0.1:${server.port}. Is the server running?\n`;
    await alex.press("1\rAlex\r", `${words}${MENU}|`);
    const again = budgetChat({ port: server.port });
    alex.type("1\rAlex\rtwo\r");
    await again.heard.until("joined: Alex\nAlex: two\n");
  });
});

describe("the way out", () => {
  const WAYS = ["\r", "/QUIT \r", "\x04", "half a line that vanishes\x03"];
  test.each(WAYS)("%j ends the program, and what was said before arrives", async (keys) => {
    const { alex, say } = await joined({ pace: { blank: 20 } });
    await say(`bye\r${keys}`, "Alex: bye\nend of Alex\n");
    await alex.ends(0);
    expect(alex.picture().text).toEndWith("* The room contains: bob, carol\nYou: bye");
  });

  test.each([
    ["SIGINT", 0],
    ["SIGTERM", 143],
    ["SIGHUP", 129],
    ["SIGUSR2", 1], // an exception, see below
    ["Ctrl+C in the middle of a paste", 0],
    ["no server", 1],
  ])("leaves the terminal as it was: %s", async (how, wanted) => {
    const server = budgetChat();
    if (how === "no server") server.stop();
    const fault = `process.on("SIGUSR2", () => { throw new Error("not foreseen"); })`;
    const command = pacedClient({}, server.port, ["--name", "Alex"], fault);
    const start = `sh -c 'echo "pid $$"; exec "$0" "$@"' "$0" "$@"`;
    const script = `stty -a; echo =; ${start}; echo "code $?"; stty -a; echo =`;
    const shell = inTerminal(["sh", "-c", script, ...command]);
    const [before] = await shell.out.until(/^[^]*?=\r\n/);
    const [, pid] = await shell.out.until(/pid (\d+)/);
    if (how !== "no server") {
      await shell.out.until("You: ");
      shell.type(`\x1b[200~one\rtwo\rhalf${how.startsWith("SIG") ? "\x1b[201~" : ""}`);
      await server.heard.until("Alex: two\n");
      await shell.out.until("half");
      if (how.startsWith("SIG")) process.kill(Number(pid), how);
      else shell.type("\x03");
    }
    const [shown, code] = await shell.out.until(/^[^]*?code (\d+)\r\n/);
    const [after] = await shell.out.until(/^[^]*?=\r\n/);
    expect([Number(code), after]).toEqual([wanted, before]);
    if (how === "SIGUSR2") expect(shown).toContain("not foreseen\r\n");
    if (how === "no server") expect(shown).toContain("Is the server running?\r\n");
    expect(picture(shown, 80).text).not.toMatch(/^ *at /m); // no trace of a stack
    const { text } = shell.out;
    expect(text.lastIndexOf("\x1b[?2004l")).toBeGreaterThan(text.lastIndexOf("\x1b[?2004h"));
    expect(text.lastIndexOf("\x1b[?7h")).toBeGreaterThan(text.lastIndexOf("\x1b[?7l"));
  });

  test("a terminal that hangs up ends the program without a trace", async () => {
    const server = budgetChat();
    const problems = `${folder}/stderr`;
    const program = ["sh", "-c", `exec "$0" "$@" 2>${problems}`];
    const alex = inTerminal([...program, ...client(server.port, "--name", "Alex")]);
    await alex.out.until("You: ");
    await alex.press("half a li", "You: half a li|");
    alex.child.terminal?.close();
    await server.heard.until("end of Alex");
    await alex.child.exited;
    expect(await Bun.file(problems).text()).toBe("");
  });

  test("typing goes on where it was after Ctrl+Z or a stop from outside, and fg", async () => {
    const server = budgetChat();
    const shell = inTerminal(["bash", "--norc", "-i"], { env: { PS1: "[shell] " } });
    await shell.out.until("[shell] ");
    const start = client(server.port, "--name", "Alex").join(" ");
    shell.type(`sh -c 'echo pid $$; exec ${start}'\r`);
    const [, pid] = await shell.out.until(/pid (\d+)/);
    await shell.out.until("You: ");
    shell.type("hello wor\x1a");
    await shell.out.until(/Stopped[^]*\[shell\] /);
    shell.type("fg\r");
    await shell.out.until("You: hello wor");
    await shell.press("ld\x01!", "You: !|hello world");
    process.kill(Number(pid), "SIGSTOP");
    await shell.out.until(/Stopped[^]*\[shell\] /);
    server.say("[bob] meanwhile");
    shell.type("fg\r");
    await shell.out.until("You: !hello world");
    await shell.press("\x05?", "[bob] meanwhile\nYou: !hello world?|");
    shell.type("\r\x04");
    await server.heard.until("Alex: !hello world?\nend of Alex\n");
    await shell.out.until("[shell] ");
  });

  test("says what was not sent, and what may be lost", async () => {
    const { alex, server } = await joined({ habits: { resets: true } });
    const words = "Leaving the chat...\nThe last lines may be lost.\nConnection closed.\n";
    await alex.press("one\rq\r", `You: one\n${words}${MENU}|`);
    alex.type("1\rAlex\rtwo\r/quit\r");
    await alex.ends(1, "The last lines may be lost.\r\n");

    const { alex: kim } = await joined({ server });
    server.stop();
    await kim.out.until("Trying again");
    kim.type("one\rtwo\r/quit\r");
    await kim.ends(1, "2 lines were not sent.\r\n");
  });

  const SLOW_WAYS = ["/quit\r", "\x04", "\x03", "q\r"];
  test.each(SLOW_WAYS)("Ctrl+C after %j ends it though the server does not close", async (keys) => {
    const pace = { patience: 1, signal: 60_000, exit: 60_000 };
    const { alex, say } = await joined({ habits: { neverCloses: true }, pace });
    await say(`bye\r${keys}`, "Alex: bye\nend of Alex\n");
    const patience = "Waiting for the server to take the last lines. Ctrl+C ends at once.\r\n";
    if (keys !== "\x03") await alex.out.until(patience);
    await alex.prints("\x03", "The last lines may be lost.\r\n");
    await alex.child.exited;
  });

  test.each([
    ["pipe", `{ stdin: "pipe" }`, 130],
    ["terminal", "{ terminal: { data() {} } }", 0],
  ])("a %s of which nobody reads bars no way out, and costs little", async (_, options, code) => {
    const server = budgetChat();
    const command = pacedClient({ signal: 100, exit: 200 }, server.port, ["--name", "Alex"]);
    const program = ["sh", "-c", `exec "$0" "$@" 2>&1`, ...command];
    const holding = `
      const child = Bun.spawn(${JSON.stringify(program)}, ${options});
      console.log("pid", child.pid);
      const code = await child.exited;
      console.log("code", code, "memory", child.resourceUsage().maxRSS);`;
    const holder = inPipe([process.execPath, "--eval", holding]);
    const [, pid] = await holder.out.until(/pid (\d+)/);
    await server.heard.until("joined: Alex\n");
    holder.child.kill("SIGSTOP"); // so it reads nothing any more
    const news = "* bob has joined the chat\n* bob has left the chat\n";
    server.guests[0]?.send(news.repeat(600_000));
    await Bun.sleep(150); // in which it could take all of that in
    process.kill(Number(pid), "SIGINT");
    const isAlive = () => !/^State:\s+Z/m.test(fs.readFileSync(`/proc/${pid}/status`, "latin1"));
    while (isAlive()) await turns(1);
    holder.child.kill("SIGCONT");
    const [, exitCode, bytes] = await holder.out.until(/code (\d+) memory (\d+)/);
    expect(Number(exitCode)).toBe(code);
    expect(Number(bytes)).toBeLessThan(100 * MIB);
  });
});

describe("typing", () => {
  const long = `${"the quick brown fox jumps over the lazy dog ".repeat(2)}and rests a while`;
  const wide = "漢字かな交じり文を書いている人の端末は四十桁しかない、それでも乱れない";

  test("is not disturbed by what arrives", async () => {
    const { alex, server } = await joined({ columns: 40 });
    for (const [text, keys, before] of [
      ["hello", "\x1b[D\x1b[D", "hel"],
      [long, "", long],
      [long, "\x01", ""],
      [wide, "\x1b[D".repeat(5), wide.slice(0, -5)],
      [`👍🏽 ok ${FAMILY}${FAMILY}`, "\x1b[D", `👍🏽 ok ${FAMILY}`],
      [`${FLAGS}${FLAGS}`, "\x1b[D\x1b[D", FLAGS],
      ["x".repeat(35), "", "x".repeat(35)],
      [`${"x".repeat(34)}${wide}`, "\x01", ""],
    ] as const) {
      const begin = alex.out.text.length;
      let above = "You: ";
      // A terminal itself says how a text looks that nothing has disturbed.
      const settled = async () => {
        const look = () => picture(`You: ${alex.out.text.slice(begin)}`, 40);
        const wanted = picture(`${above}${text}`, 40).text;
        const { x, y } = picture(`${above}${before}`, 40);
        const cursor = x === 40 ? [0, y + 1] : [x, y];
        await alex.out.soon(
          () => Bun.deepEquals([look().text, look().x, look().y], [wanted, ...cursor]) || undefined,
          () => `no ${wanted} with the cursor at ${cursor} in ${look().marked}`,
        );
      };
      alex.type(paste(text) + keys);
      await settled();
      for (const said of [["[bob] hi"], numbered(20, "carol")]) {
        server.say(...said);
        above = above.replace(/You: $/, `${said.join("\r\n")}\r\nYou: `);
        await settled();
      }
      await alex.press("\x05\x15", "You: |");
    }
  });

  test("knows the keys of readline", async () => {
    const { alex } = await joined();
    for (const [keys, wanted] of [
      ["ab\x1b[Dc\x1bOD\x7f", "|cb"],
      ["ab\x1b[H\x1b[3~x\x1b[F!", "xb!|"],
      ["ab\x1bOH\x1b[C.\x1bOF\x08", "a.|"],
      ["one two\x1bbx\x1bfy", "one xtwoy|"],
      ["one two\x1b[1;5Dx\x1b[1;3Dy\x1b[1;5C", "one yxtwo|"],
      ["one two\x17\x19\x19", "one twotwo|"],
      ["one two\x1b\x7f\x01\x1bd!", "!|"],
      ["one two\x02\x0b\x15\x19", "one tw|"],
      ["a\t\tb\x1bx\x1b[15~\x1b[5~é漢👍🏽", "abé漢👍🏽|"],
      [paste("a\tb\x1b[31m\x07c"), "a bc|"],
    ] as const) {
      await alex.press(keys, `You: ${wanted}`);
      await alex.press("\x05\x15", "You: |");
    }
    await alex.prints("x\x0c", "\x1b[H\x1b[2J");
    const begin = alex.out.text.length;
    await alex.prints("y", "You: xy");
    expect(picture(alex.out.text.slice(begin), 80).marked).toBe("You: xy|");
  });

  test("is drawn anew when the window becomes narrower and wider", async () => {
    const { alex, server, say } = await joined();
    const draft = long.slice(0, 69);
    const cut = (columns: number) => {
      const rows = `You: ${draft}`.match(RegExp(`.{1,${columns}}`, "g")) ?? [];
      return `${rows.map((row) => row.trimEnd()).join("\n")}|`;
    };
    await alex.press(draft, cut(80));
    for (const columns of [30, 20, 100, 10, 80]) {
      alex.resize(columns);
      await alex.out.until(`${columns}t`);
      await alex.out.until("You: ");
      await alex.shows(cut(columns));
      server.say(`[bob] ${columns}`);
      await alex.out.until(`${columns}\r\n`);
      await alex.shows(cut(columns));
    }
    const { text } = alex.picture();
    expect(text.match(/You: /g)).toHaveLength(1); // no ghost of an older drawing
    expect(text.match(/lazy/g)).toHaveLength(1);
    await say("\r", `Alex: ${draft}\n`);
  });

  test("shows the rows around the cursor where the window is too small for all", async () => {
    const { alex, server, say } = await joined({ columns: 10, rows: 5 });
    const draft = times(50, (number) => `${number + 10}`).join("");
    const rows = `You: ${draft}`.match(/.{1,10}/g) ?? [];
    await alex.press(draft, `${rows.slice(-4).join("\n")}|`);
    const begin = rows.slice(0, 4).join("\n").replace("You: ", "You: |");
    await alex.press("\x01", begin);
    server.say("[bob] hi");
    await alex.out.until("hi\r\n");
    await alex.shows(`     hi\n${begin}`);
    expect(alex.picture().text.match(/You: /g)).toHaveLength(1);
    await say("\r", `Alex: ${draft}\n`);
  });

  test("completes commands and names of those present, the latest speaker first", async () => {
    const roster = "* The room contains: bob, bill, Boris, carol";
    const { alex, server, say } = await joined({ habits: { roster }, pace: { crowd: 1 } });
    const offers = (keys: string, wanted: string) => say(`${keys}.\r`, `Alex: ${wanted}.\n`);
    server.say("[bill] hi", "[Alex -> carol] hi", "* bob has left the chat");
    server.say("* bea has joined the chat");
    await alex.out.until("bea has joined");
    await offers("b\t", "bea: ");
    await offers("b\t\t", "bill: ");
    await offers("b\t\t\t", "Boris: ");
    await offers("b\t\t\t\x1b[Z", "bill: ");
    await offers("\t\t", "carol: ");
    await offers("a\t", "a"); // not oneself
    await offers("/m\tca\t", "/msg carol ");
    await offers("b\t\t\t\t", "bea: "); // around, for bob has left
    server.say("* carol is now called dora");
    await alex.out.until("dora");
    await offers("c\t", "c");
    await offers("d\t", "dora: ");
    server.say("* The room contains: zoe");
    await alex.out.until("zoe");
    await offers("d\t", "d");
    await offers("@z\t", "@zoe ");
  });

  test("brings back what was said, and nothing of the menu, which 2 ends", async () => {
    const server = budgetChat();
    const alex = inTerminal(client(server.port));
    await alex.press("1\rＡlex\r", "You: |"); // the first letter is a wide one
    alex.type("one\rtwo\rdraft\x1b[A\x1b[A\x1b[A!\r");
    await server.heard.until("joined: Alex\nAlex: one\nAlex: two\nAlex: one!\n");
    alex.type("dr\x1b[A\x1b[Baft\rq\r2\r");
    await server.heard.until("Alex: draft\nend of Alex\n");
    await alex.ends(0, "Exiting the program.\r\n");
  });

  test("a blank line ends nothing when more input follows", async () => {
    const { alex, server, say } = await joined({ pace: { blank: 60 } });
    await say("one\r\r\rtwo\r\rx", "Alex: one\nAlex: two\n");
    const begin = performance.now();
    while (performance.now() - begin < 120) {
      await alex.prints("x", "x");
    }
    await say("\r", /Alex: x+\n/);
    const paced = await joined({ server, pace: { blank: 60_000 } });
    paced.alex.type("\r");
    for (const word of ["hi", "hello", "still there?"]) {
      server.say(`[bob] ${word}`);
      await paced.alex.out.until(`[bob] ${word}`);
    }
    await paced.say("three\r\r", "Alex: three\n");
    expect(server.heard.text).not.toContain("end of");
  });
});

describe("a paste", () => {
  test("is sent line by line, without its blank lines, and no line of it is a command", async () => {
    const { alex, server, say } = await joined({ pace: { pasted: 0 } });
    const lines = times(300, (number) => (number % 7 === 3 ? "" : `line ${number}\tof it`));
    lines.splice(10, 4, "q", "// a comment", "/quit", "/ignore bob");
    await say(`${paste(lines.join("\r"))}\rand typed\r`, "Alex: and typed\n");
    await alex.out.until("You: and typed\r\n");
    const sent = lines.filter((line) => line !== "").map((line) => line.replace(/^\//, "//"));
    const heard = sent.map((line) => `Alex: ${line}\n`).join("");
    expect(server.heard.text).toBe(`joined: Alex\n${heard}Alex: and typed\n`);
    const shown = "\nYou: line 1    of it\nYou: line 2    of it\n";
    expect(picture(alex.out.text, 80).text).toContain(shown);
    expect(alex.out.text).not.toContain("Hidden");

    // A line that is too long is cut, with a word.
    const words = "A line takes 8192 characters. What follows is left out.\r\n";
    await alex.prints(`${paste("0123456789".repeat(2000))}\r`, words);
    const [, said] = await server.heard.until(/Alex: (\d+)\n/);
    expect(said).toBe("0123456789".repeat(820).slice(0, 8192));

    // The last line of a paste waits for Enter, and is no command either.
    await alex.press(paste("one\r/quit"), "You: one\nYou: /quit|");
    await say("\r", "Alex: one\nAlex: //quit\n");
    const keys = `/msg bob ${paste("a secret")}\r${paste("q")}\r`;
    await say(keys, "Alex: /msg bob a secret\nAlex: q\n");
  });

  test("is counted without its blank lines, and a line typed behind it is not lost unsaid", async () => {
    const { alex, say } = await joined({ pace: { pasted: 1000 } });
    const pasted = `${numbered(40).join("\r\r")}\r`;
    await say(`${paste(pasted)}typed\r`, "line 19\n"); // so many go at once
    await alex.out.until("20 lines are on their way");
    alex.type("\x03");
    await alex.out.until("20 lines were not sent.");
    alex.type("\x03");
    await alex.ends(0, "1 line was not sent.");
  });

  test("that is long shows how much is left, and Ctrl+C stops the rest", async () => {
    const { alex, server, say } = await joined({ pace: { pasted: 10 } });
    alex.type(`${paste(`${numbered(300).join("\r")}\r`)}typed\rhalf`);
    const left = /(2\d\d) lines are on their way at the pace of the room; Ctrl\+C stops them\./;
    const [, first] = await alex.out.until(left);
    let now = first;
    while (now === first) [, now] = await alex.out.until(left);
    await server.heard.until("line 19\n"); // so many go at once
    await alex.out.until(RegExp(`${left.source}[^\n]*\nYou: half`));
    alex.type("\x03");
    const [, unsent] = await alex.out.until(/(\d+) lines were not sent\.\r\n/);
    expect(Number(unsent)).toBeLessThan(281);
    await say(" a line\r", "Alex: half a line\n");
    const sent = [...numbered(300 - Number(unsent)), "typed", "half a line"];
    const heard = sent.map((line) => `Alex: ${line}\n`).join("");
    expect(server.heard.text).toBe(`joined: Alex\n${heard}`);
    alex.type("\x03");
    await alex.ends(0);
  });
});

describe("the display", () => {
  test("shows times, colours and mentions, and rings for what is meant for its reader", async () => {
    const { alex, server } = await joined({ args: ["--bell"], env: { NO_COLOR: "" } });
    const time = "\x1b\\[2m\\d\\d:\\d\\d\x1b\\[0m ";
    expect(alex.out.text).toMatch(RegExp(`${time}(?:\x1b\\[\\d*m)*\x1b\\[2mJoining`));
    server.say("[bob] hello", "[bob] again", "[carol] alexander", "[Alex] x", "* note");
    const bob = `${time}\x1b\\[38;5;(\\d+)m\\[bob\\] \x1b\\[0m\x1b\\[0m`;
    const [, colour] = await alex.out.until(RegExp(`${bob}hello`));
    const [, again] = await alex.out.until(RegExp(`${bob}again`));
    expect(again).toBe(`${colour}`);
    await alex.out.until(/\[carol\] \x1b\[0m\x1b\[0malexander/);
    await alex.out.until("\x1b[2m* \x1b[0m\x1b[2mnote");
    expect(alex.out.text).not.toContain("\x07");

    server.say("[bob] so, ALEX", "[bob -> Alex] psst", "[Alex -> bob] answer", "[bob] .");
    await alex.out.until(/\x1b\[1;7;38;5;\d+m\[bob\] \x1b\[0m\x1b\[1mso, ALEX\x1b\[0m\r\n\x07/);
    await alex.out.until("\x1b[1;35m[bob -> Alex] \x1b[0m\x1b[1;35mpsst\x1b[0m\r\n\x07");
    const [own] = await alex.out.until(/\[Alex -> bob\] [^]*\[bob\]/);
    expect(own).not.toContain("\x07");
    await alex.prints("so\r", RegExp(`${time}\x1b\\[2mYou: \x1b\\[0m\x1b\\[0mso`));
  });

  test("gathers those who come or go at the same time", async () => {
    const { alex, server } = await joined({ pace: { crowd: 100_000 } });
    server.say("* a has joined the chat", "* b has joined the chat");
    server.say(...Array.from("abcde", (name) => `* ${name} has left the chat`));
    server.say("* f has left the chat (too slow)", "* g has entered the room", "[bob] hi");
    server.say("* x has left the chat", "* y has left the chat (kicked by bob: x)");
    server.say("* h has joined the chat");
    await alex.out.until("kicked");
    const left = "* a and b have joined\n* a, b and 4 others have left\n* g has entered the room\n";
    const kicked = "* x has left the chat\n* y has left the chat (kicked by bob: x)\n";
    const wanted = `${left}[bob] hi\n${kicked}* h has joined the chat\n`;
    await alex.press("well\r", `${wanted}You: well\nYou: |`);
  });

  test("lets no byte of a stranger's server reach the terminal as a control", async () => {
    const { alex, server } = await joined({ args: ["--bell"] });
    const begin = alex.out.text.length;
    server.say(
      "[bob] \x1b]0;owned\x07\x1b[2J\x1b[?1049h\x9b31m\x08\x7f\rred\0",
      "\x1b[31m* \u202eevil\u2066 \u0085\u2028\u2029.",
      "[\x1b[5mbob] x\ty",
    );
    server.guests[0]?.send(Buffer.from("5b785d20ffc080eda0800a", "hex"));
    await alex.out.until(/\[x\] \ufffd+/);
    const shown = alex.out.text.slice(begin);
    expect(shown).toContain("[bob] ]0;owned[2J[?1049h31mred\r\n");
    expect(shown).toContain("[31m* evil .\r\n");
    expect(shown).toContain("[[5mbob] x    y\r\n");
    const withoutOurs = shown.replace(/\x1b\[(\d*[ACJK]|\?7[hl])/g, "");
    expect(withoutOurs).not.toMatch(/[^\P{C}\r\n]/u);
  });

  test("lets no text look like a line of somebody else's", async () => {
    const { alex, server } = await joined({ columns: 60 });
    await alex.prints(`${"x".repeat(49)} [bob] mine\r`, "mine");
    const forged = "17:47 * carol has left the chat";
    for (const blank of " \t\u00a0\u2003\u3000\u2800\u3164\u1680")
      server.say(...times(60, (count) => `[bob] hi${blank.repeat(count)}${forged}`));
    server.say(...times(60, (count) => `${"x".repeat(count)} ${forged}`));
    server.say(...times(60, (count) => `* note${"漢".repeat(count)}\u3000${forged}`));
    const url = `http://example.org/${"y".repeat(50)}`;
    server.say(`[bob] ${url}`, "[bob] done");
    await alex.out.until("[bob] done\r\n");
    const { text } = picture(alex.out.text, 60);
    expect(text.replaceAll("\n", "")).toContain(`[bob] ${url}[bob] done`);
    expect(text.match(/carol\s+has\s+left/g)).toHaveLength(60 * 10);
    expect(text).not.toMatch(/^(\d\d:\d\d |\* carol|\[bob\] mine)/m);
    expect(text).toMatch(/^You: x+\n {11}\[bob\] mine$/m);
  });

  test("cuts a large roster at the entrance, and shows all of it for /who", async () => {
    const names = called("name", 300).join(", ");
    const roster = `* The room contains: zoe, ${names}`;
    const { alex, server, say } = await joined({ habits: { roster }, columns: 60 });
    const shown = /^\* 301 people are here: name0, .*\n {8}.* more \(\/who shows all\)\nYou:/m;
    expect(alex.picture().text).toMatch(shown);
    await say("z\t\r", "Alex: zoe: ");
    server.say(`* 301 people are here: ${names}, zoe`);
    await alex.out.until(/name299,\s+zoe\r\n/);
  });

  test("hides those who are ignored, under whatever name, and rings for none of them", async () => {
    const { alex, server } = await joined({ args: ["--bell"] });
    await alex.prints("/ignore\r/ignore BOB\r", /\d\d:\d\d Nobody is hidden\.\r\n/);
    await alex.out.until("What BOB says is hidden from now on. /ignore BOB shows it again.\r\n");
    server.say("[bob] one, Alex", "[bob -> Alex] two", "* bob is now called Bill", "[Bill] three");
    server.say("[carol] about bob", "[Alex -> bob] own");
    await alex.shows("* bob is now called Bill\n[carol] about bob\n[Alex -> bob] own\nYou: |");
    expect(alex.out.text).not.toContain("\x07");
    await alex.prints("/ignore\r", "Hidden: Bill\r\n"); // as he is called now
    server.say("[Bill] four", "[bob] somebody else");
    await alex.out.until("[bob] somebody else");
    await alex.prints("/IGNORE  bill\r", "What Bill says is shown again.\r\n");
    server.say("[Bill] back, alex");
    await alex.out.until("[Bill] back, alex\r\n\x07");
    expect(alex.out.text).not.toMatch(/two|three|four/);
    expect(server.heard.text).toBe("joined: Alex\n");
  });

  test.each([
    ["TERM=dumb", { TERM: "dumb" }, "[bob] café 漢"],
    ["a locale without UTF-8", { LC_ALL: "C" }, "[bob] caf? ?"],
    ["LC_CTYPE before LANG", { LC_ALL: "", LC_CTYPE: "C", LANG: "C.UTF-8" }, "[bob] caf? ?"],
    ["LANG at last", { LC_ALL: "", LC_CTYPE: "", LANG: "POSIX" }, "[bob] caf? ?"],
  ])("is plain lines without escape codes: %s", async (_, env, line) => {
    const { alex, server, say } = await joined({ env: { NO_COLOR: "", ...env } });
    await alex.prints("half", "half");
    server.say("[bob] café 漢");
    await alex.out.until(RegExp(`\r\n\\d\\d:\\d\\d ${RegExp.escape(line)}\r\nYou: half`));
    await say(" é\x7f\x01ü\r\x0c", "Alex: ühalf \n");
    alex.type("\x04");
    await alex.ends(0);
    expect(alex.out.text).not.toMatch(/[^\P{C}\r\n]/u);
    if (line.includes("?")) expect(alex.out.text).toMatch(/^[\r\n\x20-\x7e]*$/);
  });

  test("cuts what has 900 KB, be it a greeting, a refusal or a notice", async () => {
    const huge = "x".repeat(900_000);
    const server = budgetChat({ greeting: huge, refusals: [huge] });
    const alex = inTerminal(hastyClient(server.port, "--name", "Alex"));
    await alex.out.until("x… (cut)\r\n");
    await alex.out.until("x… (cut)\r\n");
    await alex.out.until("Enter your username: ");
    await alex.prints("Al\r", "You: ");
    server.say(`* ${huge}`, `* bob has joined the chat${huge}`, "[bob] hi");
    await alex.out.until("x… (cut)\r\n");
    await alex.out.until("[bob] hi\r\n");
    expect(alex.out.text.length).toBeLessThan(60_000);
  });

  test("a flood of messages and people takes little memory, and Ctrl+C ends it", async () => {
    const { alex, server, say } = await joined();
    const joins = times(50_000, (number) => `* ${"n".repeat(30)}${number} has joined the chat`);
    server.say(...joins, "[bob] then");
    await alex.out.until("[bob] then\r\n");
    expect(memory(alex.child.pid, "VmHWM")).toBeLessThan(100 * 1024);
    const keys = `${"n".repeat(30)}9000\t${"n".repeat(30)}49999\t\r`;
    await say(keys, /Alex: n+9000: n+49999\n/); // no more than 10,000 are kept

    const messages = toText(Array(1000).fill("[bob] all work and no play"));
    const guest = server.guests[0];
    const flood = setInterval(() => {
      if (guest?.isSent && guest.isOpen) guest.send(messages);
    }, 1);
    cleanups.push(() => clearInterval(flood));
    await alex.out.until("no play\r\n");
    await say("\x03", "end of Alex");
    await alex.ends(0);
  });
});

describe("a foreign server", () => {
  test.each([
    ["in a line", NAME_RULE, NAME_RULE, {}],
    ["without a newline", "No.", "No.", { newline: "" }],
    ["in several lines", "No.\nGo away.", "No. Go away.", {}],
    ["without a word", "", NO_REASON, {}],
    ["in a line, and its FIN comes later", "Taken!", "Taken!", { pause: 100 }],
    ["like a roster", "* Taken: Alex", "* Taken: Alex", { pause: 100 }],
  ])(
    "refuses the name of --name %s, and another one is asked for",
    async (_, refusal, shown, habits) => {
      const server = budgetChat({ greeting: "Name, please?", refusals: [refusal], ...habits });
      const start = pacedClient({ moment: 20, doubt: 1000 }, server.port, ["--name", "Alex"]);
      const alex = inTerminal(start);
      const begin = "Name, please?\nConnected to server.\nJoining the chat as Alex...\n";
      await alex.shows(`${begin}${shown}\nEnter your username: |`);
      await alex.press("Al\r", "* The room contains: bob, carol\nYou: |");
      await server.heard.until("joined: Al\n");
    },
  );

  test.each([
    ["without a newline", "Who are you? ", ""],
    ["in two lines, the last one without a newline", "Hello!\nName: ", ""],
    ["like a notice", "* Who are you?", "\n"],
  ])("greets %s, and the name is asked for", async (_, greeting, newline) => {
    const server = budgetChat({ greeting, newline });
    const alex = inTerminal(hastyClient(server.port));
    const [first = ""] = greeting.split("\n");
    await alex.shows(`${first.trimEnd()}\nConnected to server.\n${MENU}|`);
    await alex.press("1\rAlex\r", "* The room contains: bob, carol\nYou: |");
    await server.heard.until("joined: Alex\n");
  });

  test("may have no roster, or one in its own words, and Tab knows who is in it", async () => {
    for (const roster of ["[Willi] oh, Alex", "* Here are: Willi, bob"]) {
      const server = budgetChat({ roster });
      const pace = { doubt: roster.startsWith("[") ? 60_000 : 50 };
      const alex = inTerminal(pacedClient(pace, server.port, ["--name", "Alex"]));
      await alex.shows(`${roster}\nYou: |`);
      alex.type("w\thi\r");
      await server.heard.until("Alex: Willi: hi\n");
    }
  });
});

describe("losing the server", () => {
  test("waits for its turn when it comes back, longer than for a server that is new", async () => {
    const habits = { isOurs: true, greetsLate: 1500 };
    const { server } = await joined({ habits, pace: { silence: 1000, retry: 1 } });
    server.drop();
    await server.heard.until("joined: Alex");
    await server.heard.until("joined: Alex"); // on the second connection
    expect(server.guests).toHaveLength(2);
  });

  test("is told at once, and not again by Ctrl+C", async () => {
    const { alex, server, say } = await joined();
    await say("hello\r", "Alex: hello\n");
    server.drop();
    await alex.prints("", "Trying again");
    alex.type("\x03");
    await alex.ends(0);
    expect(alex.out.text).not.toContain("may be lost");
    expect(alex.out.text).toContain("What you said last may not have arrived.");
  });

  test("comes back under the same name, past its own ghost, with what was typed", async () => {
    const { alex, server, say } = await joined({ pace: { retry: 1, doubt: 50 } });
    await say("/nick Al\r", "/nick Al\n");
    server.say("* Alex is now called Al");
    await alex.out.until("now called Al");
    server.refusals.push("* The name Al is taken.");
    server.drop();
    await say("meanwhile\rhalf ", "refused: Al\n");
    await server.heard.until("joined: Al\nAl: meanwhile\n");
    await say("a line\r", "Al: half a line\n");
    const { text } = alex.picture();
    const lost = "Connection lost. What you said last may not have arrived. Trying again in";
    expect(text).toContain(`* Alex is now called Al\n${lost}\n      1 s.\n`);
    expect(text).toMatch(/^\* The name Al is taken\. Trying again in [123] s\.$/m);
    await alex.out.until("You: half a line\r\n");
    server.drop();
    await alex.out.until(/Trying again in\s+1 s\./); // the count begins anew
  });

  test("tries again after 1, 2, 4 ... 30 s", async () => {
    const { alex, server } = inPipeWith({}, hastyClient);
    await alex.out.until("The room contains");
    server.stop();
    const last = "2[4-9]|3[0-6]";
    for (const seconds of ["1", "2", "[345]", "[6-9]|10", "1[2-9]", last, last])
      await alex.err.until(RegExp(`Trying again in (${seconds}) s`));
  });
});

describe("the client and the server", () => {
  test.each(BOTH_WAYS)("talk, whisper, change names and leave, %s", async (_, openRoom) => {
    const server = openRoom();
    const trust = server.ca ? ["--ca", certificate.cert] : [];
    const start = (name: string) =>
      pacedClient({ crowd: 1, doubt: 60_000 }, server.port, ["--name", name, ...trust]);
    const alex = inTerminal(start("Alex"));
    await alex.shows("* The room contains:\nYou: |");
    const sam = inTerminal(start("Sam"));
    await sam.shows("* The room contains: Alex\nYou: |");
    const kim = await enter(server, "Kim");
    await alex.out.until(/Kim ha(s|ve) joined/);
    alex.type("Hello 漢字 everyone!\r");
    await sam.out.until("[Alex] Hello 漢字 everyone!\r\n");
    expect(await kim.line()).toBe("[Alex] Hello 漢字 everyone!");
    sam.type("/msg ale\tpsst\r");
    await alex.out.until("[Sam -> Alex] psst");
    await sam.out.until("[Sam -> Alex] psst");
    kim.send("/nick Kimberly\n");
    await alex.out.until("* Kim is now called Kimberly\r\n");
    sam.child.kill("SIGKILL");
    await alex.out.until("* Sam has left the chat");
    await alex.prints("/help\r", "Here also: /ignore NAME, and q, which leaves the chat.");
    alex.type("//bye\r\x04");
    await kim.until("[Alex] /bye");
    expect(await kim.line()).toBe("* Alex has left the chat");
    await alex.ends(0);
  });
});

// --- 11. The client in a pipe ------------------------------------------------------------------

describe("the client in a pipe", () => {
  const roster = "* The room contains: bob, carol\n";
  const LOST = "The last lines may be lost.\n";

  test("sends each line up to /quit, and its output is what the room says", async () => {
    const server = budgetChat({ greeting: "Who are you?" });
    const alex = inPipe(client(server.port));
    alex.type(" Alex \n\none\n  \nq\r\n/who\n/ignore bob\n");
    await server.heard.until("joined: Alex\nAlex: one\nAlex: q\nAlex: /who\nAlex: /ignore bob\n");
    server.say("[bob] hi\x1b[31m", "* x has joined the chat", "* y has joined the chat");
    alex.type("two\n/QUIT\nthree\n");
    await server.heard.until("Alex: two\nend of Alex\n");
    const out = `${roster}[bob] hi[31m\n* x has joined the chat\n* y has joined the chat\n`;
    expect(await alex.result()).toEqual({ code: 0, out, err: "" });
  });

  test("50,000 lines arrive complete and in order", async () => {
    const { alex, server } = inPipeWith();
    const lines = times(50_000, (number) => `line ${number} ${"x".repeat(number % 50)}`);
    alex.end(lines.join("\n"));
    expect(await alex.result()).toEqual({ code: 0, out: roster, err: "" });
    const heard = lines.map((line) => `Alex: ${line}\n`).join("");
    expect(server.heard.text).toBe(`joined: Alex\n${heard}end of Alex\nclosed Alex\n`);
  });

  test.each(BOTH_WAYS)("faster than the room allows, all lines arrive, %s", async (_, openRoom) => {
    const server = openRoom({ rate: 2000 });
    const reader = await enter(server, "reader");
    const trust = server.ca ? ["--ca", certificate.cert] : [];
    const writer = inPipe(client(server.port, "--name", "writer", ...trust));
    writer.end(toText(numbered(4400)));
    const heard = await reader.until("* writer has left the chat");
    expect(heard).toEqual(["* writer has joined the chat", ...numbered(4400, "writer")]);
    const out = "* The room contains: reader\n";
    expect(await writer.result()).toEqual({ code: 0, out, err: "" });
  });

  test("all that the room said reaches a reader that comes late", async () => {
    const farewell = toText(numbered(20_000, "bob"));
    const script = `exec 3<&0; : | "$0" "$@" | (read go <&3; cat)`;
    const { alex, server } = inPipeWith({ farewell }, client, script);
    await server.heard.until("end of Alex\nclosed Alex");
    alex.end("go\n");
    expect(await alex.result()).toEqual({ code: 0, out: `${roster}${farewell}`, err: "" });
  });

  test("ends quietly when nobody reads its output any more", async () => {
    const script = `"$0" "$@" | head -1; echo "code \${PIPESTATUS[0]}"`;
    const { alex, server } = inPipeWith({}, client, script);
    await server.heard.until("joined: Alex");
    const talk = setInterval(() => server.say("[bob] anybody?"), 5);
    cleanups.push(() => clearInterval(talk));
    expect(await alex.result()).toEqual({ code: 0, out: `${roster}code 1\n`, err: "" });
  });

  test("says that the disk is full", async () => {
    const { alex } = inPipeWith({}, client, `"$0" "$@" > /dev/full`);
    const err = expect.stringMatching(/^ENOSPC[^\n]*\n$/);
    expect(await alex.result()).toEqual({ code: 1, out: "", err });
  });

  test.each([
    ["SIGINT", 130, {}, ""],
    ["SIGTERM", 143, {}, ""],
    ["SIGINT", 130, { neverCloses: true }, LOST],
  ] as const)("sends what it has read before it ends by %s, %d, %j", async (...row) => {
    const [signal, code, habits, err] = row;
    const server = budgetChat(habits);
    const pace = { signal: err ? 50 : 60_000, exit: 60_000 };
    const alex = inPipe(pacedClient(pace, server.port, ["--name", "Alex"]));
    alex.type("one\n");
    await server.heard.until("one\n");
    alex.child.kill(signal);
    await server.heard.until("end of Alex\n");
    expect(await alex.result()).toEqual({ code, out: roster, err });
  });

  test("connects again, sends the rest, and fails if lines may be lost", async () => {
    const lost = "Trying again in 1 s.\n";
    const { alex: silent, server } = inPipeWith({}, hastyClient);
    await silent.out.until("The room contains");
    server.drop();
    await silent.err.until(`Connection lost. ${lost}`);
    silent.end("one\n");
    await server.heard.until("joined: Alex\nAlex: one\nend of Alex\n");
    expect(await silent.result()).toMatchObject({ code: 0, err: `Connection lost. ${lost}` });

    const alex = inPipe(hastyClient(server.port, "--name", "Alex"));
    alex.type("one\n");
    await server.heard.until("Alex: one\n");
    server.drop();
    alex.end("two\n");
    await server.heard.until("joined: Alex\nAlex: two\nend of Alex\n");
    const doubt = "Connection lost. What you said last may not have arrived.";
    expect(await alex.result()).toMatchObject({ code: 1, err: `${doubt} ${lost}${LOST}` });
  });

  const BAD_ENDS = [{ resets: true }, { neverCloses: true }];
  test.each(BAD_ENDS)("fails with a word when the end of the server is bad: %j", async (habits) => {
    const { alex, server } = inPipeWith(habits, hastyClient);
    alex.end("one\n");
    await server.heard.until("Alex: one\nend of Alex\n");
    expect(await alex.result()).toEqual({ code: 1, out: roster, err: LOST });
  });

  test("says why it cannot join", async () => {
    const SILENT = "Could not connect to ADDRESS. It says nothing. Try --tls.";
    const cases: [Habits, string][] = [
      [{ refusals: ["* The name Alex is taken."] }, "* The name Alex is taken."],
      [{ refusals: ["No."], newline: "" }, "No."],
      [{ refusals: ["x".repeat(900_000)] }, `${"x".repeat(8192)}… (cut)`],
      [{ refusals: [""] }, NO_REASON],
      [{ greeting: "* The server is full.", isFull: true }, "* The server is full."],
      [{ greeting: "Full", newline: "", isFull: true }, "Full"],
      [{ greeting: "", isFull: true }, "Could not connect to ADDRESS. It closed the connection."],
      [{ greeting: "" }, SILENT],
      [{ roster: "" }, SILENT],
    ];
    const joining = cases.map(async ([habits, why]) => {
      const { alex, server } = inPipeWith(habits, hastyClient);
      const err = `${why}\n`.replace("ADDRESS", `127.0.0.1:${server.port}`);
      expect(await alex.result()).toEqual({ code: 1, out: "", err });
    });
    await Promise.all(joining);
  });

  test("needs a name", async () => {
    const alex = inPipe(client(budgetChat().port));
    alex.end();
    const err = "A name is needed: the first line, or --name.\n";
    expect(await alex.result()).toEqual({ code: 1, out: "", err });
  });

  test("shows lines as in a terminal where its output is one", async () => {
    const server = budgetChat();
    const command = client(server.port, "--name", "Alex").join(" ");
    const alex = inTerminal(["sh", "-c", `sleep 60 | ${command}`]);
    await server.heard.until("joined: Alex\n");
    server.say(`[eve] ${"x ".repeat(60)}end`);
    await alex.out.until("end");
    expect(alex.out.text).toMatch(/\r\n\d\d:\d\d \[eve\] x[x ]+\r\n {12}x[x ]+end/);
  });

  test("sends a line again, whole, of which a lost connection took a part", async () => {
    const habits = { stopsReading: true };
    const server = budgetChat(habits);
    const { room } = inProcess(server.port);
    await room.join("Alex");
    await server.heard.until("joined: Alex\n");
    const long = "x".repeat(1_000_000);
    for (let count = 0; count < 20; count++) void room.send(long);
    const sent = room.send("the end");
    habits.stopsReading = false;
    server.drop();
    await sent;
    await server.heard.until("Alex: the end\n");
    const again = server.heard.text.split("joined: Alex\n")[2]?.split("\n") ?? [];
    expect(again.slice(0, -2).filter((line) => line !== `Alex: ${long}`)).toEqual([]);
    expect(again.length).toBeGreaterThan(3);
    expect(await room.leave()).toEqual({ unsent: 0, isComplete: false });
  });
});

describe("the command line of the client", () => {
  const run = (...args: string[]) => inPipe([process.execPath, "client.ts", ...args]).result();

  test("is refused in one line when it is wrong", async () => {
    const ports = ["", " 0", " 65536", " 12.5", " --tls"].map((number) => `--port${number}`);
    const counts = ["", " 201", " x"].map((number) => `--history${number}`);
    const wrong = ["--nope", "stray", ...ports, ...counts];
    const results = await Promise.all(wrong.map((options) => run(...options.split(" "))));
    const err = expect.stringMatching(/^[^\n]+\. Try --help\.\n$/);
    for (const result of results) expect(result).toEqual({ code: 2, out: "", err });
  });

  test("has a help, and a version, which is that of the server", async () => {
    const [help, version] = await Promise.all([run("--help"), run("--version")]);
    expect([help.code, help.err]).toEqual([0, ""]);
    const words = [
      "--host",
      "127.0.0.1",
      "5555",
      "--history N",
      "/msg NAME TEXT",
      "/ignore NAME",
      "Shift+Tab",
    ];
    expect(words.filter((word) => !help.out.includes(word))).toEqual([]);
    expect(help.out.split("\n").filter((line) => line.length > 100)).toEqual([]);
    expect(version).toEqual(await inPipe(["./server.ts", "--version"]).result());
  });

  test("says where there is no server, and no such host", async () => {
    const server = budgetChat();
    server.stop();
    const port = `${server.port}`;
    for (const [host, words] of [
      ["127.0.0.1", `127.0.0.1:${port}. Is the server running?`],
      ["::1", `[::1]:${port}. `],
      ["no.such.host.invalid", `no.such.host.invalid:${port}. There is no such host.`],
    ] as const) {
      const { code, out, err } = await run("--host", host, "--port", port, "--name", "Alex");
      expect([code, out]).toEqual([1, ""]);
      expect(err).toStartWith(`Could not connect to ${words}`);
      expect(err).toMatch(/^[^\n]+\n$/);
    }
  });

  test("its times are those that are promised", () => {
    expect(PACE).toMatchObject({ silence: 10_000, moment: 1000, doubt: 2000, retry: 1000 });
    expect(PACE).toMatchObject({ lastWords: 30_000, blank: 300, pasted: 100, crowd: 200 });
    expect(PACE).toMatchObject({ patience: 2000, signal: 1000, exit: 2000 });
  });
});

describe("the client under TLS", () => {
  test("sends nothing to a server whose certificate proves nothing, and says why", async () => {
    const elsewhere = await makeCertificate("elsewhere", "DNS:example.org");
    const { cert, key } = certificate;
    const signed = await makeCertificate("signed", "IP:127.0.0.1", ` -CA ${cert} -CAkey ${key}`);
    const expired = { key, cert: `${folder}/expired-cert.pem` };
    await openssl(`x509 -in ${cert} -signkey ${key} -days -1 -out ${expired.cert}`);
    // Only `openssl ca` takes a date, and it wants a database.
    const future = { key, cert: `${folder}/future-cert.pem` };
    const settings = `[ca]\ndefault_ca = one\n[one]\ndatabase = ${folder}/db\nrand_serial = yes
      new_certs_dir = ${folder}\ndefault_md = sha256\npolicy = any\nx509_extensions = hosts
      [any]\ncommonName = supplied\n[hosts]\nsubjectAltName = IP:127.0.0.1`;
    await Promise.all([Bun.write(`${folder}/db`, ""), Bun.write(`${folder}/cnf`, settings)]);
    const later = "-startdate 20900101000000Z -enddate 20910101000000Z";
    const own = `-ss_cert ${cert} -cert ${cert} -keyfile ${key} -out ${future.cert}`;
    await openssl(`ca -batch -config ${folder}/cnf ${later} ${own}`);
    for (const [shown, trust, reason] of [
      [certificate, ["--tls"], /Its certificate is self-signed: /],
      [expired, ["--ca", expired.cert], /Its certificate has expired: /],
      [future, ["--ca", future.cert], /Its certificate is not (valid yet|yet valid): /],
      [elsewhere, ["--ca", elsewhere.cert], /Its certificate is for (a wrong|another) host: /],
      [signed, ["--tls"], /Its certificate is .* unknown authority: /],
    ] as const) {
      const tls = { cert: Bun.file(shown.cert), key: Bun.file(shown.key) };
      const server = budgetChat({ tls });
      const alex = inPipe(client(server.port, ...trust, "--name", "Alex"));
      alex.type("a secret\n");
      const { code, out, err } = await alex.result();
      expect([code, out, server.heard.text.replace("closed \n", "")]).toEqual([1, "", ""]);
      expect(err).toStartWith(`Could not connect to 127.0.0.1:${server.port}. `);
      expect(err).toMatch(RegExp(`${reason.source}[^\\n]+\n$`));
    }
  });

  test("refuses a file for --ca that is none, or holds no certificate, or a broken one", async () => {
    const broken = `${folder}/broken.pem`;
    fs.writeFileSync(broken, certificate.ca.replace(/\n[A-Za-z0-9+/]{20}/, "\nAAAA"));
    for (const [file, words] of [
      [`${folder}/none`, "cannot be read."],
      [certificate.key, "holds no certificate in PEM."],
      [broken, "holds no certificate in PEM."],
    ] as const) {
      const alex = inPipe(client(1, "--ca", file, "--name", "Alex"));
      expect(await alex.result()).toEqual({ code: 1, out: "", err: `${file} ${words}\n` });
    }
  });

  test("says when only one side speaks TLS", async () => {
    const { port } = open();
    const alex = inPipe(client(port, "--tls", "--name", "Alex"));
    const { code, out, err } = await alex.result();
    expect([code, out]).toEqual([1, ""]);
    expect(err).toStartWith(`Could not connect to 127.0.0.1:${port}. It does not speak TLS: `);
    const bob = inPipe(hastyClient(openTls().port, "--name", "bob"));
    expect((await bob.result()).err).toEndWith("It says nothing. Try --tls.\n");
  });
});

// --- 12. The client and the history -------------------------------------------------------------

describe("the client as a follower", () => {
  /** A follower called alice that has arrived, and has read everything up to position 10. */
  function arrived() {
    const outbox = createOutbox();
    const follower = createFollower(outbox);
    const sent: string[] = [];
    const socket = {
      write(bytes: Uint8Array) {
        sent.push(Buffer.from(bytes).toString());
        return bytes.length;
      },
    } as unknown as Socket<undefined>;

    follower.begin();
    follower.take(["* Since 9 until 9", "* alice has joined the chat", "* 10"], "alice");

    return {
      outbox,
      follower,
      socket,
      say(...lines: string[]) {
        for (const line of lines) void outbox.add(line);
        outbox.writeTo(socket, true);
        return sent.splice(0).join("");
      },
      /** What is shown of some lines. */
      hear(...lines: string[]) {
        const { missed, present } = follower.take(lines, "alice");
        return [...missed, ...present].map(({ text }) => text);
      },
      /** The connection is lost and there is another one. What is shown of the answer to /since? */
      comeBack(...lines: string[]) {
        follower.lose();
        outbox.handleLoss();
        expect(follower.begin()).toBe("/since 10");
        const { missed, present, hasArrived, doubtful } = follower.take(lines, "alice");
        const shown = [...missed, ...present].map(({ text }) => text);
        outbox.writeTo(socket, true);
        return { shown, hasArrived, doubtful, again: sent.splice(0).join("") };
      },
    };
  }

  test("shows a line when its mark has come, and what it alone is told at once", () => {
    const alice = arrived();
    const said = ["[bob] one", "* bob is now called rob", "[rob] two", "* The server says: hi"];
    expect(alice.hear(...said)).toEqual([]);
    expect(alice.hear("* 11")).toEqual(said);
    expect(alice.hear("[bob -> alice] psst")).toEqual(["[bob -> alice] psst"]);
    expect(alice.hear("[bob] a", "* 1 person is here: bob", "* 12")).toEqual([
      "[bob] a",
      "* 1 person is here: bob",
    ]);
  });

  test("takes back what has no mark, but not what it was told", () => {
    const alice = arrived();
    expect(alice.hear("[bob] one", "[bob -> alice] psst")).toEqual([]);
    expect(alice.follower.lose()).toEqual([expect.objectContaining({ to: "alice" })]);
  });

  test("knows which of its lines have arrived", () => {
    const alice = arrived();
    alice.say("one", "/who", "two", "/help", "three");
    expect(alice.outbox.doubtful).toBe(5);
    const people = "* 1 person is here: alice";
    expect(alice.hear("[alice] one", people, ANSWERED, "[alice] two", "* 11")).toEqual([people]);
    expect([alice.outbox.doubtful, alice.outbox.isSettled]).toEqual([2, false]);

    // An answer may have several lines, and a private message of somebody else is none.
    expect(alice.hear("* /help", "* /who", "[bob -> alice] psst")).toHaveLength(3);
    expect(alice.outbox.doubtful).toBe(2);
    alice.hear(ANSWERED, "[alice] three", "* 12");
    expect([alice.outbox.doubtful, alice.outbox.isSettled]).toEqual([0, true]);
  });

  const LEFT = "* alice has left the chat";
  const JOINED = "* alice has joined the chat";

  /** What alice had said, what she has missed, what she sends again, and what she is shown. */
  type Return = {
    name: string;
    said: string[];
    missed: string[];
    again?: string;
    shown?: string[];
  };

  test.each<Return>([
    {
      name: "sends again what did not arrive",
      said: ["one", "two"],
      missed: ["[alice] one"],
      again: "two\n",
    },
    {
      name: "sends nothing twice",
      said: ["one", "two"],
      missed: ["[alice] one", "[alice] two", LEFT],
      shown: [LEFT],
    },
    {
      name: "sends no command again",
      said: ["/who", "x".repeat(4097), "one", "/msg bob x"],
      missed: [],
      again: "one\n",
    },
    {
      name: "is not taken in by a namesake",
      said: ["one", "two"],
      missed: ["[alice] one", LEFT, JOINED, "[alice] two", LEFT],
      again: "two\n",
      shown: [LEFT, JOINED, "[alice] two", LEFT],
    },
    {
      name: "is not taken in by a namesake after a crash of the server",
      said: ["one"],
      missed: [JOINED, "[alice] one", LEFT],
      again: "one\n",
      shown: [JOINED, "[alice] one", LEFT],
    },
    {
      name: "is not taken in by somebody who takes its name after a crash",
      said: ["one"],
      missed: ["* eve is now called alice", "[alice] one", LEFT],
      again: "one\n",
      shown: ["* eve is now called alice", "[alice] one", LEFT],
    },
    {
      name: "does not take the arrival of a namesake for its own",
      said: [],
      missed: [LEFT, "* 20", JOINED, "[alice] hi", LEFT],
      shown: [LEFT, JOINED, "[alice] hi", LEFT],
    },
    {
      name: "knows itself under the name that it asked for",
      said: ["one", "/nick ally"],
      missed: ["[alice] one", "* alice is now called ally", "* ally has left the chat"],
      shown: ["* alice is now called ally", "* ally has left the chat"],
    },
    { name: "is told of a shutdown once", said: [], missed: [SHUTDOWN], shown: [SHUTDOWN] },
  ])("that comes back $name", ({ said, missed, again = "", shown = [] }) => {
    const alice = arrived();
    alice.say(...said);
    const hasNoMark = ["[bob] this comes again", SHUTDOWN];
    const answer = ["* Since 10 until 20", ...missed, JOINED, "* 21"];
    const returned = alice.comeBack(...hasNoMark, ...answer);
    expect(returned).toEqual({ shown, hasArrived: true, doubtful: 0, again });
  });

  const GAP = "* Some lines are missing here.";

  test.each<{ name: string; answer: string[]; shown: string[] }>([
    {
      name: "from the beginning",
      answer: ["* Since 15 until 20", "[alice] one", "* 20"],
      shown: [GAP, "[alice] one"],
    },
    {
      name: "in the middle",
      answer: ["* Since 10 until 20", "[bob] a", "* 12", "* Since 15 until 20", "[alice] one"],
      shown: ["[bob] a", GAP, "[alice] one"],
    },
    {
      name: "because it is another history",
      answer: ["* Since 10 until 5", "[bob] a", "* 12"],
      shown: [GAP, "[bob] a", JOINED],
    },
  ])("says that lines are missing $name, and sends nothing twice", ({ answer, shown }) => {
    const alice = arrived();
    alice.say("one");
    void alice.outbox.add("two");
    const returned = alice.comeBack(...answer, JOINED, "* 21");
    expect(returned).toEqual({ shown, hasArrived: true, doubtful: 1, again: "two\n" });
  });

  test("that leaves counts what has no mark", () => {
    const alice = arrived();
    alice.say("/msg bob psst");
    alice.hear("[carol] hi", "[alice -> bob] psst", ANSWERED);
    const texts = alice.follower.finish().map(({ text }) => text);
    expect(texts).toEqual(["[carol] hi", "[alice -> bob] psst"]);
    expect(alice.outbox.doubtful).toBe(0);
  });

  test("sends nothing behind a new name before it has an answer", () => {
    const alice = arrived();
    expect(alice.say("one", "/nick ally", "two")).toBe("one\n/nick ally\n");
    alice.hear("[alice] one", "* alice is now called ally", ANSWERED, "* 11");
    expect(alice.say()).toBe("two\n");
    alice.hear("[ally] two", "* 12");
    expect(alice.outbox.isSettled).toBe(true);

    expect(alice.say("/nick bob", "three")).toBe("/nick bob\n");
    alice.hear("* The name bob is taken.", ANSWERED);
    expect(alice.say()).toBe("three\n");
  });

  test("arrives behind the position before it, even if it cannot find its own arrival", () => {
    const follower = createFollower(createOutbox());
    follower.begin();
    expect(follower.take(["* Since 9 until 9", "[bob] hi", "* 10"], "alice").hasArrived).toBe(true);
    follower.begin();
    expect(follower.take(["* Since 12 until 11"], "alice").hasArrived).toBe(true);
  });

  test("does not grow when a server sets no marks, or sends nothing back", () => {
    const alice = arrived();
    const empty = times(100, () => alice.hear("[bob] hi", ...Array(1000).fill("")).length);
    expect(Math.max(...empty)).toBeWithin(50_000, 100_000);
    alice.hear("* 11");

    const line = `[bob] ${"x".repeat(100_000)}`;
    const shown = times(300, () => alice.hear(line).length);
    expect(Math.max(...shown)).toBeWithin(100, 200);

    const text = "x".repeat(4000);
    for (let count = 0; count < 1000; count++) void alice.outbox.add(text);
    expect(alice.say().length).toBeLessThan(1.1 * 1024 * 1024);
  });

  test("takes more lines only when those that must be sent again are sent", async () => {
    const alice = arrived();
    alice.say("one");
    alice.follower.lose();
    alice.outbox.handleLoss();
    alice.follower.begin();
    const { write } = alice.socket;
    alice.socket.write = () => 0;
    alice.follower.take(["* Since 10 until 10", JOINED, "* 11"], "alice");
    let isSent = false;
    const sent = alice.outbox.add("two").then(() => (isSent = true));
    alice.outbox.writeTo(alice.socket, true);
    await turns(2);
    expect(isSent).toBe(false);
    alice.socket.write = write;
    alice.outbox.writeTo(alice.socket, true);
    await sent;
  });

  test("takes more lines when those that were sent again have arrived", async () => {
    const alice = arrived();
    const sent = ["one", "/nick ally"].map((line) => alice.outbox.add(line));
    alice.say(); // nothing waits, but the new name has no answer yet
    const returned = alice.comeBack("* Since 10 until 20", JOINED, "* 21");
    expect(returned.again).toBe("one\n");
    await Promise.all(sent);
  });

  test("does not take a new name for confirmed that comes again", () => {
    const alice = arrived();
    alice.say("/nick ally");
    alice.hear("* alice is now called ally", ANSWERED);
    alice.follower.lose();
    expect(alice.outbox.handleLoss()).toBe(1);
  });

  test("recalls lines only when it first comes, before it arrives", () => {
    const follower = createFollower(createOutbox(), 5);
    expect(follower.begin()).toBe("/since -5");
    const recalled = "* 1764000000000000 [bob] hi";
    const arrival = ["[bob] at once", "* alice has joined the chat", "[bob] a", "* 10"];
    const lines = [recalled, "* Since 9 until 9", ...arrival];
    expect(follower.take([recalled], "alice").missed).toEqual([]);
    expect(follower.lose()).toEqual([]); // it comes again
    expect(follower.begin()).toBe("/since -5");

    const { missed, present } = follower.take(lines, "alice");
    expect(missed).toEqual([
      { text: "[bob] hi", from: "bob", at: 1764000000000, isRecalled: true },
      { text: "[bob] at once", from: "bob", at: 0.01, isRecalled: true },
      { text: "* ---" },
    ] as Entry[]);
    expect(present.map(({ text }) => text)).toEqual(["[bob] a"]);

    const cut = createFollower(createOutbox(), 5);
    cut.begin();
    cut.take([recalled, "* Since 9 until 9"], "alice");
    cut.lose();
    cut.begin();
    const again = cut.take(["* Since 9 until 10", "* 10", JOINED, "* 11"], "alice");
    expect(again.missed).toEqual([{ text: "* ---" }]);
    expect(follower.begin()).toBe("/since 10");
  });
});

describe.concurrent("a client that comes later", () => {
  /** A file in which bob has said three lines, long ago. */
  function oldHistory(): string {
    const at = Date.parse("2026-01-02T03:04:00Z") * 1000;
    const lines = ["* bob has joined the chat", ...numbered(3, "bob")];
    const rows = lines.map((line, place): Row => [at + place, `${line}\n`]);
    return writeHistory([[at - 1, ""], ...rows]);
  }

  const TIME = new Date("2026-01-02T03:04:00Z").toLocaleString("sv").slice(0, 16);

  const recalled = (...lines: string[]) => [...lines.map((line) => `${TIME} ${line}`), "* ---"];

  test.each([
    ["the last lines, with their own times", [], recalled(...numbered(3, "bob"))],
    ["as many as it wants", ["--history", "1"], recalled("[bob] line 2")],
    ["none if it wants none", ["--history", "0"], []],
  ])("is shown, before the roster, %s", async (_, options, rows) => {
    const server = await serve("--db", oldHistory(), "--keep", "0");
    const command = client(server.port, "--name", "Alex", ...options);
    const alex = inTerminal(command, { env: { NO_COLOR: "" } });
    await alex.out.until("You: ");
    const shown = alex
      .picture()
      .text.split("\n")
      .map((row) => row.trimEnd());
    expect(shown.slice(2, -1)).toEqual([...rows, "* The room contains:"]);
    const isDim = alex.out.text.includes("\x1b[2m[bob] \x1b[0m\x1b[2mline 2\x1b[0m");
    expect(isDim).toBe(rows.length > 0);
    await alex.press("b\t", "You: b|"); // bob is not here any more
  });

  test("in a pipe, none unless it asks for them", async () => {
    const server = await serve("--db", oldHistory(), "--keep", "0");
    const ask = (name: string, ...options: string[]) => {
      const pipe = inPipe(client(server.port, "--name", name, ...options));
      pipe.end("");
      return pipe.result();
    };
    expect((await ask("Alex")).out).not.toContain("bob");
    const [, ...lines] = numbered(3, "bob").map((line) => `* ${TIME} ${line}\n`);
    const asked = await ask("Kim", "--history", "2");
    expect(asked.out).toStartWith(`${lines.join("")}* ---\n* The room contains:`);
  });
});

describe("nothing is missed", () => {
  /** The lines of the people in a text, without their names. */
  const said = (text: string) =>
    Array.from(text.matchAll(/^\[[^\]]*\] (.*)$/gm), ([, line = ""]) => line);

  /** All that was said in the room of a file. */
  function saidIn(file: string): string[] {
    using database = new Database(file);
    const rows = database.query<{ text: string }, []>("SELECT text FROM history ORDER BY at").all();
    return said(rows.map(({ text }) => text).join(""));
  }

  const SEED = Number(process.env["SEED"] ?? Math.floor(Math.random() * 1e6));

  test(`and nothing is said twice, wherever connections are cut (SEED=${SEED})`, async () => {
    const random = randomNumbers(SEED);
    const file = newFile();
    const start = (port = "0") => serve("--db", file, "--rate", "0", "--port", port);
    let server = await start();
    const proxy = cutter(() => server.port, random);

    const COUNT = 80; // lines of each client
    const clients = times(4, (number) => ({ number, ...inProcess(proxy.port) }));
    for (const { room, number } of clients) expect(await room.join(`c${number}`)).toEqual({});
    proxy.state.isCalm = false;

    const talking = clients.map(async ({ room, number }) => {
      for (let line = 0; line < COUNT; line++) {
        const padding = random(20) === 0 ? "x".repeat(random(1000)) : "";
        void room.send(`${number}.${line} ${padding}`);
        if (random(25) === 0) void room.send(`/nick c${number}${"abc"[random(3)]}`);
        if (random(3) === 0) await Bun.sleep(random(12));
      }
    });
    for (let kill = 0; kill < 2; kill++) {
      await clients[0]?.notices.until("Connection lost"); // some of them must be under way
      server.child.kill("SIGKILL");
      await server.child.exited;
      server = await start(`${server.port}`);
    }
    await Promise.all(talking);
    proxy.state.isCalm = true;
    await Promise.all(
      clients.map(async ({ shown, room }) => {
        await shown.when(() => said(shown.text).length >= 3 * COUNT || undefined);
        expect(await room.leave()).toMatchObject({ unsent: 0 });
      }),
    );
    server.child.kill("SIGTERM");
    await server.child.exited;

    const log = saidIn(file);
    for (const { number, shown } of clients) {
      const isOwn = (line: string) => line.startsWith(`${number}.`);
      const own = log.filter(isOwn).map((line) => line.split(" ")[0]);
      expect(own).toEqual(times(COUNT, (line) => `${number}.${line}`));
      expect(said(shown.text)).toEqual(log.filter((line) => !isOwn(line)));
      expect(shown.text).not.toContain("missing");
    }
    expect(proxy.state.cuts).toBeGreaterThan(0);
  });

  test("by a tool whose server is killed while lines wait there, and comes back", async () => {
    const file = newFile();
    const server = await serve("--db", file, "--rate", "30");
    const alex = inPipe(hastyClient(server.port, "--name", "Alex"));
    const lines = times(500, (number) => `${number} ${"x".repeat(1000)}`);
    const listener = await enter(server, "listener");
    alex.end(toText(lines));
    await listener.until(`[Alex] ${lines[20]}`);
    server.child.kill("SIGKILL");
    await server.child.exited;
    const again = await serve("--db", file, "--rate", "0", "--port", `${server.port}`);
    expect(await alex.result()).toMatchObject({ code: 0, err: expect.stringContaining("lost") });
    again.child.kill("SIGTERM");
    await again.child.exited;
    expect(saidIn(file)).toEqual(lines);
  });

  test("also when the name, as it was given, has something that a server takes out", async () => {
    const alex = inProcess(open().port);
    await alex.room.join(" Al\u200eex\r");
    void alex.room.send("hello");
    expect(await alex.room.leave()).toEqual({ unsent: 0, isComplete: true });
    expect(alex.shown.text).toBe("* The room contains: \n");
  });

  test("and /since is left to the client", async () => {
    const alex = inProcess(open().port);
    await alex.room.join("Alex");
    for (const line of ["one", "/since 0", "two"]) void alex.room.send(line);
    expect(await alex.room.leave()).toEqual({ unsent: 0, isComplete: true });
    expect(alex.shown.text).toBe("* The room contains: \n");
    expect(alex.notices.text).toBe("The client does that itself.\n");
  });

  /** A server that greets as ours does, and leaves the rest to the test. */
  async function pretender(habits: Habits = {}) {
    const server = budgetChat({ greeting: WELCOME, ...habits });
    const alex = inProcess(server.port);
    const entered = alex.room.join("Alex");

    /** Waits for a question, and answers it. */
    async function answer(question: string, ...lines: string[]) {
      await server.heard.until(`Alex: ${question}\n`);
      server.say(...lines);
    }
    return { server, ...alex, entered, answer };
  }

  const CAUGHT_UP = ["* Since 9 until 9", "* Alex has joined the chat", "* 10"];
  const CAUGHT_UP_AGAIN = ["* Since 10 until 11", "* 11", "* Alex has joined the chat", "* 12"];

  /** Says a line and leaves, and the connection is lost before the line has come back. */
  async function lostOnTheWayOut() {
    const { server, room, answer } = await pretender();
    await answer("/since", ...CAUGHT_UP);
    void room.send("one");
    const left = room.leave();
    await server.heard.until("Alex: one\n");
    server.drop();
    return { server, answer, left };
  }

  test("also when the connection is lost on the way out", async () => {
    const { answer, left } = await lostOnTheWayOut();
    await answer("/since 10", ...CAUGHT_UP_AGAIN);
    await answer("one", "[Alex] one", "* 13");
    expect(await left).toEqual({ unsent: 0, isComplete: true });
  });

  test.each(["/since 10", "one"])(
    "also when it is shown out on the way, after %s",
    async (last) => {
      const { server, answer, left } = await lostOnTheWayOut();
      if (last === "one") await answer("/since 10", ...CAUGHT_UP_AGAIN);
      await answer(last, "* You have come in from elsewhere.");
      for (const guest of server.guests) guest.socket.shutdown();
      expect(await left).toMatchObject({ isComplete: false });
      expect(server.guests).toHaveLength(2);
    },
  );

  test("also what comes last, without a mark", async () => {
    const { room, shown, answer, entered } = await pretender({ farewell: "[bob] bye\n" });
    await answer("/since", ...CAUGHT_UP);
    await entered;
    await room.leave();
    expect(shown.text).toEndWith("[bob] bye\n");
  });

  test("also when a server says nothing for too long", async () => {
    PACE.lastWords = 20;
    cleanups.push(() => (PACE.lastWords = 30_000));
    const { server, notices, answer, entered } = await pretender();
    await server.heard.until("/since");
    PACE.lastWords = 30_000;
    await notices.until("Connection lost. Trying again");
    await answer("/since", ...CAUGHT_UP);
    expect(await entered).toEqual({});
  });

  test("and after leaving, nothing is asked for that came before", async () => {
    const { room, answer, entered, server } = await pretender();
    await answer("/since", ...CAUGHT_UP);
    await entered;
    await room.leave();
    void room.join("Alex");
    await server.heard.until("joined: Alex\nAlex: /since\n");
  });

  test("but a command without an answer may be lost, and a tool fails", async () => {
    const { room, answer, entered } = await pretender();
    await answer("/since", ...CAUGHT_UP);
    await entered;
    void room.send("/msg kim secret");
    expect(await room.leave()).toEqual({ unsent: 0, isComplete: false });
  });

  test("but a line may be lost when something is missing, and a tool fails", async () => {
    const { server, room, answer, entered } = await pretender();
    await answer("/since", ...CAUGHT_UP);
    await entered;
    void room.send("one");
    await server.heard.until("Alex: one\n");
    server.drop();
    await answer("/since 10", "* Since 11 until 11", "* Alex has joined the chat", "* 12");
    expect(await room.leave()).toEqual({ unsent: 0, isComplete: false });
    expect(server.heard.text.split("Alex: one")).toHaveLength(2);
  });

  test("but a tool with nothing to say does not come back for it", async () => {
    const { server, room } = await pretender();
    await server.heard.until("/since");
    const left = room.leave();
    server.drop();
    expect(await left).toEqual({ unsent: 0, isComplete: true });
  });

  test("but another server at the same port cannot say what has arrived", async () => {
    const { server, room, answer, entered } = await pretender();
    await answer("/since", ...CAUGHT_UP);
    await entered;
    void room.send("one");
    await server.heard.until("Alex: one\n");
    server.stop();
    const other = budgetChat({ port: server.port });
    await other.heard.until("joined: Alex\n");
    void room.send("two");
    await other.heard.until("Alex: two\n");
    expect(await room.leave()).toEqual({ unsent: 0, isComplete: false });
    expect(other.heard.text).not.toContain("one");
  });

  test("but a room that has forgotten everything says so, and the chat goes on", async () => {
    const server = open();
    const alex = inProcess(server.port);
    await alex.room.join("Alex");
    await server.stop();
    const again = open({ port: server.port });
    await alex.shown.until("* Some lines are missing here.\n* The room contains: \n");
    const bob = await enter(again, "bob");
    await alex.shown.until("bob has joined");
    void alex.room.send("hello");
    await bob.until("[Alex] hello");
    expect(await alex.room.leave()).toEqual({ unsent: 0, isComplete: true });
  });
});

// --- 13. The client and passwords --------------------------------------------------------------

const UNSAFE = "A password is sent only to a server of bun-chat, and under TLS or to this"; // machine
const REGISTERED = "* The name Alex is registered. Enter it with its password: Alex PASSWORD";

/** Starts a client whose connections seem to come from far away. */
const distant = (port: number, ...args: string[]) =>
  pacedClient(
    { retry: 1 },
    port,
    args,
    `const { connect } = Bun;
     Bun.connect = (options) => {
       const { open } = options.socket;
       options.socket.open = (socket) => {
         Object.defineProperty(socket, "remoteAddress", { value: "203.0.113.7" });
         open(socket);
       };
       return connect(options);
     }`,
  );

describe("the client and passwords", () => {
  const HIDDEN = `/register x = /register *; /password a b = /password ***; /nick bob x = /nick bob *;
    /NICK  bob  x y = /NICK  bob ****; /nick bob = /nick bob; /register = /register;
    /registers x = /registers x; //register x = //register x; hi = hi`;
  test.each(rowsOf(HIDDEN))("are not seen in a command: %s", (row) => {
    const [typed = "", shown] = row.split(" = ");
    expect(hidePassword(typed)).toBe(shown ?? "");
  });

  const NEW = "* The name Alex is registered now. Enter it with its password: Alex PASSWORD";
  const CHANGED = "* The password of ALEX is changed.";
  const GONE = "* The name Alex is not registered any more.";
  test.each([
    ["one that was given", "", "", "given"],
    ["a new one", "/register new", NEW, "new"],
    ["a changed one", "/password  new one", CHANGED, " new one"],
    ["none that was not looked at", "/nick alex new", "* Alex is now called alex", "given"],
    ["none that was refused", "/password short", "* A password has 8 to 256 ...", "given"],
    ["none of another name", "/nick bob new", "* Alex is now called bob", undefined],
    ["none of somebody else", "/nick alex new", "* bob is now called alex", "given"],
    ["none of a name that was given up", "/unregister", GONE, undefined],
    ["none that nobody has sent", "", NEW, "given"],
    ["none that anybody only talks of", "/register x", `[bob] ${NEW}`, "given"],
  ])("are kept for the next connection: %s", (_, change, line, password) => {
    const keyring = createKeyring();
    keyring.begin("Alex", "given");
    keyring.hear(line, change, "Alex");
    expect(keyring.passwordOf("ALEX")).toBe(password);
    expect(keyring.passwordOf("carol")).toBeUndefined();
  });

  test("are asked for, unseen, until one is right, and kept for the next connection", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED, REGISTERED] });
    const alex = inTerminal(hastyClient(server.port));
    await alex.press("1\rAlex\r", "Password for Alex: |");
    await alex.press("wrong!\x1b[A\t\r", "The password is wrong.\nPassword for Alex: |");
    expect(server.heard.text).toBe("refused: Alex\nclosed \nrefused: Alex wrong!\nclosed \n");
    await alex.press(`${paste(" s3cret!")}x\x7f\r`, "* The room contains: bob, carol\nYou: |");
    server.drop();
    await server.heard.until("closed Alex  s3cret!\njoined: Alex  s3cret!\n");
    alex.type("\x1b[A\x1b[Aback\r\x04");
    await server.heard.until(": back\n");
    await alex.ends(0);
    expect(alex.out.text).not.toMatch(/wrong!|s3cret/);
  });

  test("may be refused to be typed: then another name is asked for", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inTerminal(client(server.port, "--name", "Alex"));
    await alex.shows("Password for Alex: |");
    await alex.press("\r", `${REGISTERED}\nEnter your username: |`);
    await alex.press("a b\r", `Enter your username: a b\n${BLANKS}\nEnter your username: |`);
    alex.type("Sam\r");
    await server.heard.until("joined: Sam\n");
  });

  test.each(["\x03", "\x04"])("the question for one is no trap: %j", async (key) => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inTerminal(client(server.port, "--name", "Alex"));
    await alex.shows("Password for Alex: |");
    alex.type(`half${key}`);
    if (key === "\x04") alex.type(`${"\x7f".repeat(4)}${key}`);
    await alex.ends(0);
    expect(alex.out.text).not.toContain("half");
  });

  test("new ones are asked for twice, and are neither shown nor brought back by Up", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true } });
    await alex.press("/register\r", "New password: |");
    await alex.press("s3cret!!\r", "Once more: |");
    alex.type("s3cret!!\r");
    await server.heard.until("Alex: /register s3cret!!\n");
    await alex.press("/password\r", "New password: |");
    await alex.press("one\r", "Once more: |");
    await alex.press("two\r", "The two passwords differ. Nothing was changed.\nYou: |");
    await alex.press("/password typed!!", "You: /password *******|");
    alex.type("\r");
    await server.heard.until("Alex: /password typed!!\n");
    await alex.press("\x1b[A", "You: /password|");
    expect(alex.out.text).not.toMatch(/s3cret|typed!/);
  });

  test("that were typed before they were asked for are not said", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true } });
    await alex.press("/register\rs3cret!!\rs3c", "1 line was not sent.\nNew password: |");
    await alex.press("\r", "New password:\nYou: |");
    alex.type("hi\r");
    await server.heard.until("Alex: hi\n");
    expect(server.heard.text).toBe("joined: Alex\nAlex: /since -10\nAlex: hi\n");
  });

  test("that were pasted or stand behind a blank are not sent as a message", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true } });
    const refused = "That was not sent, because it may hold a password.";
    await alex.prints(`${paste("/register s3cret!!")}\r`, refused);
    await alex.prints(" /password s3cret!!\r", refused);
    await alex.prints("//register said\r", "You: //register said\r\n");
    await server.heard.until("Alex: //register said\n");
    expect(server.heard.text + alex.out.text).not.toContain("s3cret");
  });

  test("are sent only where nobody can read them", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inTerminal(distant(server.port, "--name", "Alex"));
    await alex.out.until(
      "The name is registered. A password is sent only to a server of bun-chat,",
    );
    await alex.shows("Enter your username: |");
    await alex.press("Sam\r", "* The room contains: bob, carol\nYou: |");
    await alex.prints("/register s3cret!!\r", UNSAFE);
    await alex.prints("/password\r", UNSAFE);
    alex.type("hi\r");
    await server.heard.until("Sam: hi\n");
    expect(server.heard.text).not.toContain("s3cret");

    const pipe = inPipe(distant(server.port, "--name", "Alex"));
    pipe.end("/register s3cret!!\nhi\n");
    const err = expect.stringContaining(UNSAFE);
    expect(await pipe.result()).toMatchObject({ code: 1, err });
    expect(server.heard.text).not.toContain("s3cret");
  });

  test("are not sent to a server of another kind, which would tell everybody", async () => {
    const { alex, server } = await joined();
    await alex.prints("/register s3cret!!\r", UNSAFE);
    await alex.prints("/register\r", UNSAFE);
    alex.type("hi\r");
    await server.heard.until("Alex: hi\n");

    const ours = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const sam = inProcess(ours.port);
    expect(await sam.room.join("Alex")).toEqual({ refused: REGISTERED });
    expect(await sam.room.join("Alex", "s3cret!!")).toEqual({});
    ours.drop();
    ours.stop();
    const other = budgetChat({ port: ours.port });
    await other.heard.until("joined: Alex\n");
    expect(server.heard.text + other.heard.text).not.toContain("s3cret");
  });

  test("that were not sent before the connection was lost are not sent on the next one", async () => {
    const server = budgetChat({ isOurs: true });
    const alex = inProcess(server.port);
    await alex.room.join("Alex");
    void alex.room.send("/nick Al"); // behind which all waits
    void alex.room.send("/register s3cret!!");
    await server.heard.until("/nick Al\n");
    server.drop();
    await server.heard.until("joined: Alex\nAlex: /since");
    void alex.room.send("hi");
    await server.heard.until("Alex: hi\n");
    expect(server.heard.text).not.toContain("s3cret");
  });

  test("are offered again when their answer was lost", async () => {
    const server = budgetChat({ greeting: WELCOME });
    const alex = inProcess(server.port);
    const entered = alex.room.join("Alex");
    const since = ["* Since 9 until 9", "* Alex has joined the chat", "* 10"];
    await server.heard.until("/since\n");
    server.say(...since);
    await entered;
    void alex.room.send("/register s3cret!!");
    await server.heard.until("/register s3cret!!\n");
    server.refusals.push(REGISTERED);
    server.drop();
    await server.heard.until("joined: Alex s3cret!!\n");
  });

  test("that are pasted behind an empty line are not taken for a name", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inTerminal(client(server.port, "--name", "Alex"));
    await alex.shows("Password for Alex: |");
    await alex.press(paste("\rs3cret!!\r"), "* The room contains: bob, carol\nYou: |");
    expect(server.heard.text).toContain("joined: Alex s3cret!!\n");
  });

  test("are not offered without end to a server that wants none and refuses the name", async () => {
    const server = budgetChat({ isOurs: true });
    const alex = inProcess(server.port);
    await alex.room.join("Alex");
    server.refusals.push("* The name Alex is not registered, so it has no password.");
    server.drop();
    await alex.notices.until("so it has no password. Trying again in");
  });

  test("that are not needed any more are forgotten", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inProcess(server.port);
    await alex.room.join("Alex");
    await alex.room.join("Alex", "s3cret!!");
    server.refusals.push("* The name Alex is not registered, so it has no password.");
    server.drop();
    await server.heard.until("refused: Alex s3cret!!\n");
    await server.heard.until("joined: Alex\n");
  });

  test("what is typed behind one is neither seen nor said", async () => {
    const server = budgetChat({ isOurs: true, refusals: [REGISTERED] });
    const alex = inTerminal(client(server.port, "--name", "Alex"));
    await alex.shows("Password for Alex: |");
    alex.type("s3cret!!\rs3cret!!\rs3c");
    await alex.shows("* The room contains: bob, carol\n1 line was not sent.\nYou: |");
    alex.type("hi\r");
    await server.heard.until(": hi\n");
    expect(server.heard.text).not.toContain(": s3c");
    expect(alex.out.text).not.toContain("s3c");
  });

  test.each([
    ["is taken from the environment", "s3cret!!", [REGISTERED], 0, ""],
    ["is wrong", "s3cret!!", [REGISTERED, REGISTERED], 1, "The password is wrong.\n"],
    ["is missing", "", [REGISTERED], 1, `${NO_PASSWORD}\n`],
    ["is blank", "  ", [REGISTERED], 1, `${NO_PASSWORD}\n`],
    ["loses a newline", "s3\ncret!!", [REGISTERED], 0, ""],
    ["is not needed", "s3cret!!", [], 0, ""],
  ])("in a pipe one %s", async (_, password, refusals, code, err) => {
    const server = budgetChat({ isOurs: true, refusals });
    const script = `CHAT_PASSWORD='${password}' exec "$0" "$@"`;
    const alex = inPipe(["bash", "-c", script, ...client(server.port)]);
    alex.end("Alex\nhi\n");
    expect(await alex.result()).toMatchObject({ code, err });
    const first = refusals.length > 0 ? "refused: Alex\n" : "joined: Alex\n";
    expect(server.heard.text).toStartWith(first);
    expect(server.heard.text.includes(": hi\n")).toBe(code === 0);
    expect(server.heard.text.includes("s3cret!!")).toBe(
      password.trim() !== "" && refusals.length > 0,
    );
  });

  test.each([
    ["registers a name", "/register first try ", ""],
    ["changes a password", "/password first try ", "/register forgotten\n"],
    ["takes a name", "/nick Alex first try", ""],
  ])("whoever %s comes back with it after a crash of the server", async (_, command, before) => {
    const file = newFile();
    const server = await serve("--db", file);
    if (command.startsWith("/nick")) {
      const owner = await enter(server, "Alex");
      owner.send("/register first try\n/quit\n");
      await owner.rest();
    }
    const { room, notices, shown } = inProcess(server.port);
    await room.join(command.startsWith("/nick") ? "Sam" : "Alex");
    for (const line of rowsOf(before)) if (line) void room.send(line);
    void room.send(command);
    await shown.until(/registered now|changed\.|now called Alex/);
    if (before) await shown.until("is changed.");

    server.child.kill("SIGKILL");
    await server.child.exited;
    const again = await serve("--db", file, "--port", `${server.port}`);
    await notices.until("Connection lost.");
    const friend = await enter(again, "friend");
    void room.send("I am back");
    await friend.until("[Alex] I am back");

    const stranger = await greeted(again);
    stranger.send("Alex\n");
    expect(await stranger.line()).toBe(REGISTERED);
  });
});

describe("a client that is shown out", () => {
  const ELSEWHERE = "* You have come in from elsewhere.";

  test.each([
    ELSEWHERE,
    "* You were kicked by bob: too loud",
    "* You were banned by bob for 60 minutes",
  ])("says so, and does not come back by itself: %s", async (words) => {
    const { alex, server } = await joined({ habits: { isOurs: true }, pace: { retry: 1 } });
    server.say(words);
    await alex.out.until(words);
    server.drop();
    await alex.shows(`${words}\nConnection closed.\n${MENU}|`);
    alex.type("1\rAlex\rback\r");
    await server.heard.until("Alex: back\n");
    expect(server.guests).toHaveLength(2);
  });

  test.each(["a terminal", "a pipe"])("while it still comes in, is told so: %s", async (place) => {
    const server = budgetChat({ greeting: WELCOME });
    const command = client(server.port, "--name", "Alex");
    const alex = place === "a pipe" ? inPipe(command) : inTerminal(command);
    await server.heard.until("Alex: /since");
    server.say(ELSEWHERE);
    await alex.out.until(ELSEWHERE);
    if ("shows" in alex) {
      await alex.shows(`${ELSEWHERE}\nThe server has ended our stay.\nEnter your username: |`);
    } else {
      const err = "The server has ended our stay.\n";
      expect(await alex.result()).toMatchObject({ code: 1, err });
    }
  });

  test("keeps stars and unseen words to itself, and what was half written for Up", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true } });
    alex.type("/register s3cret!!");
    await alex.shows("You: /register ********|");
    server.say(ELSEWHERE);
    await alex.press("", `Connection closed.\n${MENU}|`);
    await alex.press("1\rAlex\r", "* The room contains: bob, carol\nYou: |");
    await alex.press("/password\r", "New password: |");
    alex.type("s3cr");
    server.say(ELSEWHERE);
    await alex.shows(`${ELSEWHERE}\nNew password: |`);
    await alex.press("et!!\r", "New password:\nOnce more: |");
    await alex.press(
      "s3cret!!\r",
      `Not connected: the password was not sent.\nConnection closed.\n${MENU}|`,
    );
    await alex.press("1\rAlex\r", "* The room contains: bob, carol\nYou: |");
    await alex.press("half a li", "You: half a li|");
    server.say(ELSEWHERE);
    await alex.press("", `Connection closed.\n${MENU}|`);
    await alex.press("1\rAlex\r", "* The room contains: bob, carol\nYou: |");
    await alex.press("\x1b[A", "You: half a li|");
    expect(alex.out.text + server.heard.text).not.toContain("s3cr");
  });

  test("drops the rest of a paste", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true }, pace: { pasted: 1000 } });
    alex.type("\x1b[200~one\rtwo");
    await server.heard.until("Alex: one\n");
    server.say(ELSEWHERE);
    await alex.press("", `Connection closed.\n${MENU}|`);
    alex.type("\r1\rMallory\r\x1b[201~");
    await alex.press("3\r", `Enter your choice: 3\nInvalid choice. Try again.\n${MENU}|`);
    expect(server.guests).toHaveLength(1);
  });

  test("does not come back when it is banned meanwhile", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true }, pace: { retry: 1 } });
    const words = "* You are banned for another 60 minutes.";
    server.refusals.push(words);
    server.drop();
    await alex.shows(`${words}\nConnection closed.\n${MENU}|`);
  });

  test("is told how many of its lines were not sent", async () => {
    const { alex, server } = await joined({ habits: { isOurs: true }, pace: { pasted: 1000 } });
    alex.type(paste(`${toText(numbered(30)).trimEnd()}\r`));
    await server.heard.until("Alex: line 19\n");
    server.say(ELSEWHERE);
    await alex.out.until(ELSEWHERE);
    server.drop();
    await alex.shows(`10 lines were not sent.\nConnection closed.\n${MENU}|`);
  });

  test("in a pipe ends at once, with exit code 1", async () => {
    const { alex, server } = inPipeWith({ isOurs: true });
    await server.heard.until("joined: Alex\n");
    server.say(ELSEWHERE);
    await alex.out.until(ELSEWHERE);
    server.drop();
    const err = "The server has ended our stay.\n";
    expect(await alex.result()).toMatchObject({ code: 1, err });
    expect(server.guests).toHaveLength(1);
  });

  test("in a pipe ends also while a line waits for the answer to a command", async () => {
    const { alex, server } = inPipeWith({ greeting: WELCOME });
    await server.heard.until("/since\n");
    server.say("* Since 9 until 9", "* Alex has joined the chat", "* 10");
    alex.type("/nick Al\nbehind\n");
    await server.heard.until("/nick Al\n");
    server.say(ELSEWHERE);
    expect(await alex.result()).toMatchObject({ code: 1, err: "The last lines may be lost.\n" });
  });

  test("by the same client elsewhere, which then is the only one", async () => {
    const server = open({ db: newFile() });
    const first = inProcess(server.port);
    await first.room.join("Alex");
    void first.room.send("/register s3cret!!");
    await first.shown.until("registered now");

    const second = inProcess(server.port);
    expect(await second.room.join("Alex")).toEqual({ refused: REGISTERED });
    expect(await second.room.join("Alex", "s3cret!!")).toEqual({});
    await first.shown.until(ELSEWHERE);
    void second.room.send("hello");
    const friend = await enter(server, "friend");
    void second.room.send("friend");
    await friend.until("[Alex] friend");
    expect(first.notices.text).toBe("");
  });

  test("loses its name to somebody who registers it meanwhile, and says so", async () => {
    const { alex, server } = await joined({
      habits: { isOurs: true },
      pace: { retry: 1, doubt: 50 },
    });
    server.refusals.push(REGISTERED);
    server.drop();
    await alex.shows(`${REGISTERED}\nConnection closed.\n${MENU}|`);
  });
});

// --- 14. TLS -----------------------------------------------------------------------------------
// What is the same with and without TLS stands in the sections before.

describe("a room with TLS", () => {
  test("cuts off one that speaks plainly, and one that never shakes hands", async () => {
    jest.useFakeTimers();
    const { room, log } = openLogged({}, openTls);
    const [alice, bob] = await enterAll(room, "alice", "bob");
    const plain = await Peer.connect({ port: room.port });
    plain.send("GET / HTTP/1.1\r\n\r\n");
    expect((await plain.rest()).join()).not.toContain("Welcome");
    expect(log.at(-1)).toBe("Refused 127.0.0.1:PORT: the TLS handshake failed");

    const silent = await Peer.connect({ port: room.port });
    await stillServes(room, alice, bob);
    jest.advanceTimersByTime(61_000);
    await silent.ended.promise;
    expect(silent.total).toBe(0);
    const late = "Refused 127.0.0.1:PORT: it did not finish the TLS handshake within a minute";
    expect(log.at(-1)).toBe(late);
  });

  test("takes TLS 1.2 and newer, and nothing older, from openssl s_client", async () => {
    const { port } = openTls();
    for (const version of ["-tls1_2", "-tls1_3", "-tls1_1"]) {
      const command = ["openssl", "s_client", version, "-cipher", "ALL:@SECLEVEL=0", "-quiet"];
      const bob = inPipe([...command, "-connect", `127.0.0.1:${port}`]);
      if (version === "-tls1_1") expect(await bob.result()).toMatchObject({ code: 1, out: "" });
      else await bob.out.until(WELCOME);
    }
  });

  test("reads its certificate again by SIGHUP, for newcomers; nobody inside notices", async () => {
    const current = { cert: `${folder}/current-cert.pem`, key: `${folder}/current-key.pem` };
    fs.copyFileSync(certificate.cert, current.cert);
    fs.copyFileSync(certificate.key, current.key);
    const files = ["--tls-cert", current.cert, "--tls-key", current.key];
    const server = await serve(...files, "--web", "0");
    const old = { port: server.port, ca: certificate.ca };
    const browser = await webOfProgram(server);
    const bert = await enter({ ...browser, ca: certificate.ca }, "bert");
    const alice = await enter(old, "alice");

    fs.copyFileSync(renewed.cert, current.cert); // the key is still the old one
    server.child.kill("SIGHUP");
    await server.err.until(/The certificate stays as it was\. The key does not belong/);
    await enter(old, "bob");
    fs.copyFileSync(renewed.cert, current.cert);
    fs.copyFileSync(renewed.key, current.key);
    server.child.kill("SIGHUP");
    await server.out.until("The certificate has been read again");
    const carol = await enter({ ...old, ca: renewed.ca }, "carol");
    const distrustful = await Peer.connect(old);
    await distrustful.ended.promise;
    expect(distrustful.total).toBe(0);
    await enter({ ...browser, ca: renewed.ca }, "dave");
    carol.send("hello\n");
    const heard = ["bob", "carol", "dave"].map((name) => `* ${name} has joined the chat`);
    expect(await alice.lines(4)).toEqual([...heard, "[carol] hello"]);
    await bert.until("[carol] hello");
  });
});

// --- 15. History -------------------------------------------------------------------------------

describe("what was said", () => {
  test.each([
    ["/history", 20],
    ["/history 1", 1],
    ["/HISTORY  0021 ", 21],
    ["/history 200", 200],
    ["/history 201", 200],
    ["/history 999999999", 200],
  ])("is shown by %s from the oldest of %d lines to the last", async (command, count) => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    alice.send(toText(numbered(300)));
    await bob.until("[alice] line 299");

    bob.send(`${command}\n`);
    const shown = await bob.ping();
    const texts = shown.map((line) => line.replace(/^\* \d{4}-\d\d-\d\d \d\d:\d\d /, ""));
    expect(texts).toEqual(numbered(300, "alice").slice(-count));
  });

  test("is not shown for a bad number, which is explained", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    bob.send("hello\n");
    await alice.line();
    for (const number of ["0", "x", "-1", "1e3", "1 x", "0 2", "1 2 3", "1.5", "9999999999"]) {
      alice.send(`/history ${number}\n`);
      expect(await alice.line()).toBe("* Say it like this: /history N, with N from 1 to 200");
    }
  });

  test("is all that /history tells, also what was said just now", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    bob.send("/history\n");
    expect(await bob.line()).toBe("* Nothing has been said yet.");

    alice.send("one\n/msg bob psst\n/who\n/foo\n/nick bob\n//two\n/nick anna\nthree\n/history\n");
    const answer = await alice.lines(8); // five lines come before what /history says
    const said = ["[alice] one", "[alice] /two", "[anna] three"];
    expect(answer.slice(5).map((line) => line.slice("* 2026-11-24 10:42 ".length))).toEqual(said);
    expect(await alice.ping()).toEqual([]);
  });

  const OLDER: Row[] = [
    [1_000_000, ""],
    [2_000_000, "[old] one\n* old has left the chat\n"],
    [3_000_000, "* new has joined the chat\n"],
    [4_000_000, "[new] two\n[new] three\n"],
    [5_000_000, "[new] four\n"],
  ];

  test.each([
    ["1 5000001", ["* 5000000 [new] four"]],
    ["1 5000000", ["* 4000000 [new] two", "* 4000000 [new] three"]], // a batch comes as a whole
    ["3 5000000", ["* 2000000 [old] one", "* 4000000 [new] two", "* 4000000 [new] three"]],
    ["200  4000000", ["* 2000000 [old] one"]],
    ["201 2000000", ["* Nothing was said before that."]],
    ["1 0", ["* Nothing was said before that."]],
  ])("before a position is shown by /history %s", async (request, shown) => {
    const room = open({ db: writeHistory(OLDER), keep: 0 });
    const { peer } = await follow(room, "carol");
    await linesUntil(peer, "* carol has joined the chat");
    peer.send(`/history ${request}\n`);
    expect(await peer.lines(shown.length + 1)).toEqual([...shown, ANSWERED]);
  });

  test("before a position is shown with dates to people", async () => {
    const carol = await enter(open({ db: writeHistory(OLDER), keep: 0 }), "carol");
    carol.send("/history 1 5000000\n");
    const date = expect.stringMatching(
      /^\* (1970-01-01|1969-12-31) \d\d:\d\d \[new\] (two|three)$/,
    );
    expect(await carol.ping()).toEqual([date, date]);
  });

  test("before a position is not all of a long history at once", async () => {
    const long = Array.from({ length: 20 }, (_, number): Row => {
      return [2_000_000 + number, `[old] ${number}\n${"* x has joined the chat\n".repeat(10_000)}`];
    });
    const room = open({ db: writeHistory([[1_000_000, ""], ...long]), keep: 0 });
    const carol = await enter(room, "carol");
    carol.send("/history 200 9000000\n");
    const shown = await carol.ping();
    expect(shown.at(-1)).toEndWith("[old] 19");
    expect(shown.length).toBeWithin(4, 7); // a MiB of the file was searched
  });

  test("has the local time, and the next server finds it in the file", async () => {
    const at = new Date(2026, 10, 24, 10, 42, 59, 999).getTime() * 1000;
    const file = writeHistory([
      [at - 1, ""],
      [at, "* alice has joined the chat\n[alice] hello\n[bob] * 1\n* bob has left the chat\n"],
      [at + 1000, "* alice is now called anna\n"],
      [at + 2000, "[anna] later\n"],
    ]);
    const carol = await enter(open({ db: file, keep: 0 }), "carol");
    carol.send("/history\n");
    expect(await carol.ping()).toEqual([
      "* 2026-11-24 10:42 [alice] hello",
      "* 2026-11-24 10:42 [bob] * 1",
      "* 2026-11-24 10:43 [anna] later",
    ]);
  });
});

describe("a follower", () => {
  const OLD: Row[] = [
    [1_000_000, ""],
    [2_000_000, "[old] one\n"],
    [3_000_000, "[old] two\n"],
  ];

  test("hears what was said since, the batch of its own arrival, and itself, with marks", async () => {
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    alice.send("one\ntwo\n");
    await bob.lines(2);

    const { peer: carol, until } = await follow(room, "carol");
    const replay = await batchesUntil(carol, "* carol has joined the chat");
    const before = replay.filter(({ at }) => at <= until);
    expect(before.flatMap(({ lines }) => lines)).toEqual([
      "* alice has joined the chat",
      "* bob has joined the chat",
      "[alice] one",
      "[alice] two",
    ]);
    const [arrival, ...others] = replay.slice(before.length);
    expect(arrival?.lines).toEqual(["* carol has joined the chat"]);
    expect(arrival?.at).toBeGreaterThan(until);
    expect(others).toHaveLength(0);

    carol.send("mine\nagain\n");
    const { lines, at } = await nextBatch(carol);
    expect(lines).toEqual(["[carol] mine", "[carol] again"]);
    expect(at).toBeGreaterThan(arrival?.at ?? NaN);

    // The others see neither a mark nor a line of their own.
    const heard = ["* carol has joined the chat", "[carol] mine", "[carol] again"];
    for (const peer of [alice, bob]) expect(await peer.ping()).toEqual(heard);
  });

  test("gets private messages and answers without a mark, and only once", async () => {
    const [room, alice] = await gather(open(), "alice");
    const { peer: carol } = await follow(room, "carol");
    const heard = await batchesUntil(carol, "* carol has joined the chat");
    await alice.line();

    carol.send("/who\n/msg alice psst\n");
    expect(await alice.line()).toBe("[carol -> alice] psst");
    alice.send("/msg carol hush\n");
    expect(await alice.line()).toBe("[alice -> carol] hush");
    expect(await carol.lines(5)).toEqual([
      present("alice", "carol"),
      ANSWERED,
      "[carol -> alice] psst",
      ANSWERED,
      "[alice -> carol] hush",
    ]);
    carol.send(`${"x".repeat(4097)}\n`);
    expect(await carol.lines(2)).toEqual([TOO_LONG, ANSWERED]);

    // Those among the lines of a batch come before its mark.
    carol.send("one\n/msg alice psst\ntwo\n");
    const mixed = await nextBatch(carol);
    const told = ["[carol -> alice] psst", ANSWERED];
    expect(mixed.lines).toEqual(["[carol] one", ...told, "[carol] two"]);

    carol.send(`/since ${heard.at(-1)?.at}\n/history\n`);
    expect(await carol.line()).toMatch(SINCE);
    expect(await nextBatch(carol)).toEqual({ lines: ["[carol] one", "[carol] two"], at: mixed.at });
    expect(await carol.line()).toBe(`* ${mixed.at} [carol] one`); // a position and not a date
  });

  test("gets the batch in which it says /since, as everybody does", async () => {
    const [alice, bob] = await enterAll(open(), "alice", "bob");
    bob.send("zero\n");
    alice.send("one\n/msg bob psst\n/since\ntwo\n");
    expect(await alice.line()).toBe("[alice -> bob] psst");
    expect(await alice.line()).toMatch(SINCE);
    const lines = await linesUntil(alice, "[alice] two");
    expect(lines).toEqual([
      "* alice has joined the chat",
      "* bob has joined the chat",
      "[bob] zero",
      "[alice] one",
      "[alice] two",
    ]);
    expect(await bob.lines(3)).toEqual(["[alice] one", "[alice -> bob] psst", "[alice] two"]);
  });

  test.each([
    ["0, before the beginning", "0", [1_000_000, "[old] one", "[old] two"]],
    ["the beginning", "1000000", [1_000_000, "[old] one", "[old] two"]],
    ["between two batches", "1500000", [1_500_000, "[old] one", "[old] two"]],
    ["a batch", "2000000", [2_000_000, "[old] two"]],
    ["the last batch", "3000000", [3_000_000]],
    ["nothing, which is its own arrival", "", [3_000_000]],
  ])("from %s begins there, or where it can", async (_, since, [from, ...missed]) => {
    const room = open({ db: writeHistory(OLD), keep: 0 });
    const carol = await enter(room, "carol");
    carol.send(`/since ${since}\n`);
    expect(await carol.line()).toBe(`* Since ${from} until 3000000`);
    const arrival = "* carol has joined the chat";
    expect(await linesUntil(carol, arrival)).toEqual([...missed, arrival] as string[]);
  });

  test("from the future begins now", async () => {
    const room = open({ db: writeHistory(OLD), keep: 0 });
    const now = Date.now() * 1000;
    const { peer: carol, from, until } = await follow(room, "carol", Number.MAX_SAFE_INTEGER);
    expect(from).toBeWithin(now, now + 10_000_000);
    expect(until).toBe(3_000_000);
    carol.send("hello\n");
    const { lines, at } = await nextBatch(carol);
    expect(lines).toEqual(["[carol] hello"]);
    expect(at).toBeGreaterThan(from);
  });

  test("is told where something is missing", async () => {
    const file = writeHistory([...OLD, [4_000_000, ""], [5_000_000, "[old] three\n"]]);
    const { peer: carol } = await follow(open({ db: file, keep: 0 }), "carol", 1_500_000);
    expect(await carol.until("* carol has joined the chat")).toEqual([
      "[old] one",
      "* 2000000",
      "[old] two",
      "* 3000000",
      "* Since 4000000 until 5000000",
      "[old] three",
      "* 5000000",
    ]);
  });

  test("does not come of a bad position, which is explained", async () => {
    const alice = await enter(open(), "alice");
    for (const position of ["x", "-", "1e3", "1 2", "1.5", "12345678901234567"]) {
      alice.send(`/since ${position}\nhello\n`);
      expect(await alice.ping()).toEqual(["* Say it like this: /since POSITION"]);
    }
  });

  test("that half-closes gets all that it has missed, and then the end", async () => {
    const { file, lines } = longHistory(1000, 2000);
    const room = open({ db: file, keep: 0 });
    const carol = await enter(room, "carol");
    carol.send("/since 0\nbye\n");
    carol.socket.shutdown();
    const heard = (await carol.rest()).filter((line) => !MARK.test(line));
    expect(heard.shift()).toMatch(SINCE);
    expect(heard).toEqual([...lines, "* carol has joined the chat", "[carol] bye"]);
  });

  test("that reads slowly gets all in order, and is not dropped", async () => {
    jest.useFakeTimers();
    const { file, lines } = longHistory(3000, 4000);
    const [room, alice] = await gather(open({ db: file, keep: 0 }), "alice");
    const carol = await enter(room, "carol");
    carol.socket.pause();
    carol.send("/since 0\n");
    await pass(6); // each 0.1 s with 256 KiB, as far as the kernel takes them
    for (const line of numbered(10)) {
      alice.send(`${line}\n`);
      await pass(2);
    }
    expect(namesIn(room)).toEqual(["alice", "carol"]);
    expect(queued(room, "carol")).toBeWithin(1, 0.5 * MIB); // the rest stays in the file

    carol.socket.resume();
    const heard: string[] = [];
    while (heard.at(-1) !== "[alice] line 9") {
      await pass(0.1);
      for (let line = carol.take(); line !== undefined; line = carol.take())
        if (!MARK.test(line)) heard.push(line);
    }
    expect(heard.shift()).toMatch(SINCE);
    const arrivals = ["alice", "carol"].map((name) => `* ${name} has joined the chat`);
    expect(heard).toEqual([...lines, ...arrivals, ...numbered(10, "alice")]);
  });

  test.each([
    ["size", 613, 20_000],
    ["number of batches", 23_172, 20],
  ])("pays for what it has missed by its %s", async (_, count, length) => {
    jest.useFakeTimers();
    const { file } = longHistory(count, length);
    const carol = await enter(open({ db: file, keep: 0, rate: 10 }), "carol");
    carol.countsOnly = true;
    const { total } = carol;

    // 12 MiB's worth. Two seconds' worth comes at once, and each second is worth 2 MiB.
    carol.send("/since 0\n");
    const received: number[] = [];
    for (let second = 0; second < 5; second++) {
      for (let ms = 0; ms < 1000; ms++) {
        jest.advanceTimersByTime(1);
        await turns(1);
      }
      received.push(carol.total - total);
    }
    const parts = received.map((bytes) => bytes / (received[4] ?? NaN));
    expect(parts[0]).toBeWithin(6 / 12, 7 / 12);
    expect(parts[1]).toBeWithin(8 / 12, 9 / 12);
    expect(parts[3]).toBe(1);
  });

  test("pays itself, and not with the time of others at its address", async () => {
    jest.useFakeTimers();
    const { file } = longHistory(2000, 4000);
    const room = open({ db: file, keep: 0, rate: 10, maxPerAddress: 9 });
    const [alice, bob, carol] = await enterAll(room, "alice", "bob", "carol");
    await pass(10);
    carol.send(`${"/since 0\n/history 200\n".repeat(9)}late\n`);
    await pass(5);
    alice.send("early\n");
    await pass(0.2);
    expect(bob.take()).toBe("[alice] early");
    expect(bob.take()).toBeUndefined();
  });

  test("may ask for the last lines before it came", async () => {
    const [room, alice] = await gather(open(), "alice");
    alice.send("one\ntwo\n/who\nthree\n");
    await alice.line();
    const carol = await enter(room, "carol");
    alice.send("four\n");
    await carol.line();
    carol.send("/since -2\n");
    const lines = await carol.lines(3);
    expect(lines.map((line) => line.replace(/\d{16}/g, "AT"))).toEqual([
      "* AT [alice] two",
      "* AT [alice] three",
      "* Since AT until AT",
    ]);
    expect(await linesUntil(carol, "[alice] four")).toEqual([
      "* carol has joined the chat",
      "[alice] four",
    ]);
  });
});

describe("a history in memory", () => {
  test("keeps the last few megabytes of a flood", async () => {
    const [room, alice, bob] = await gather(open(), "alice", "bob");
    const before = Date.now() * 1000;
    const lines = times(3000, (number) => `${number} `.padEnd(4000, "x"));
    alice.send(toText(lines));
    await bob.until(`[alice] ${lines.at(-1)}`);

    const { peer: carol, from } = await follow(room, "carol", 1);
    expect(from).toBeGreaterThan(before);
    const kept = await linesUntil(carol, "* carol has joined the chat");
    expect(carol.total).toBeWithin(2_000_000, 5_000_000);
    expect(kept.slice(0, -1)).toEqual(
      lines.slice(1 - kept.length).map((line) => `[alice] ${line}`),
    );
  });
});

describe("a history in a file", () => {
  test.each([
    ["30 days", 30, 34, ["[old] two", "[old] three"]],
    ["40 days", 40, 36, ["[old] one", "[old] two", "[old] three"]],
    ["ever", 0, 36, ["[old] one", "[old] two", "[old] three"]],
  ])("is kept for %s, and nothing stays of what is forgotten", async (_, keep, first, said) => {
    jest.useFakeTimers();
    const now = Date.now();
    const daysAgo = (days: number) => (now - days * 86_400_000) * 1000;
    const secret = `* ${"secret".repeat(300)}`;
    const file = writeHistory([
      [daysAgo(36), ""],
      ...times(100, (number): Row => [daysAgo(35) + number, `${secret}\n`]),
      [daysAgo(34), "[old] one\n"],
      [daysAgo(29), "[old] two\n"],
      [daysAgo(1), "[old] three\n"],
    ]);
    const room = open({ db: file, keep });
    await pass(2);

    const { peer: carol, from } = await follow(room, "carol");
    expect(from).toBe(daysAgo(first));
    const heard = await linesUntil(carol, "* carol has joined the chat");
    expect(heard.filter((line) => line.startsWith("["))).toEqual(said);

    const isKept = said.includes("[old] one");
    expect(heard.includes(secret)).toBe(isKept);
    carol.send("/history\n");
    const shown = await carol.lines(said.length);
    expect(shown.map((line) => line.replace(/^\* \d+ /, ""))).toEqual(said);

    // By another process: to read the file in this one would take away its lock.
    const search = () =>
      Bun.spawnSync(["grep", "-qs", "secret", file, `${file}-wal`]).exitCode === 0;
    expect(search()).toBe(isKept);
    carol.socket.terminate();
    await timeToStop(room);
    expect(search()).toBe(isKept);
  });

  test("of version 1 is made one of version 3, once, and keeps what was said", async () => {
    const file = writeHistory([
      [1_000_000, ""],
      [2_000_000, "[old] one\n"],
    ]);
    for (const name of ["bob", "carol"]) {
      const room = open({ db: file, keep: 0 });
      const { peer, from } = await follow(room, name);
      expect(from).toBe(1_000_000);
      const heard = await linesUntil(peer, `* ${name} has joined the chat`);
      expect(heard[0]).toBe("[old] one");
      expect(heard.filter((line) => SINCE.test(line))).toEqual([]); // nothing is missing

      // Only version 2 has names, and only version 3 finds what was said before a position.
      peer.send("/unregister\n/history 1 3000000\n");
      expect(await peer.lines(4)).toEqual([
        `* The name ${name} is not registered.`,
        ANSWERED,
        "* 2000000 [old] one",
        ANSWERED,
      ]);
      peer.socket.terminate();
      await room.stop();
    }
    using database = new Database(file);
    const versions = database.query("SELECT * FROM pragma_user_version, pragma_application_id");
    expect(versions.get()).toEqual({ user_version: 3, application_id: 0x62756e63 });
  });

  test("is of one room, and not of another in the same process", async () => {
    const rooms = times(2, () => open({ db: newFile() }));
    for (const [number, room] of rooms.entries()) {
      const { peer } = await follow(room, `user${number}`);
      peer.send(`in room ${number}\n`);
      const said = `[user${number}] in room ${number}`;
      expect(await linesUntil(peer, said)).toEqual([`* user${number} has joined the chat`, said]);
    }
  });

  test("is free for others when its server could not listen", () => {
    const { port } = open();
    const db = newFile();
    expect(() => open({ db, port })).toThrow();
    open({ db });
  });
});

describe.concurrent("bun server.ts --db", () => {
  /** All files of a folder, and what is in them. */
  const contents = (parent: string) =>
    fs.readdirSync(parent).map((name) => [name, fs.readFileSync(`${parent}/${name}`, "base64")]);

  test.each([
    ["SIGTERM", ["chat.db"]],
    ["SIGKILL", ["chat.db", "chat.db-wal"]],
  ] as const)(
    "goes on after %s where it was, and nobody else can read it",
    async (signal, files) => {
      const file = newFile();
      const first = await serve("--rate", "0", "--db", file);
      const alice = await enter(first, "alice");
      const carol = await follow(first, "carol");
      const heard = await batchesUntil(carol.peer, "* carol has joined the chat");
      for (const line of numbered(50)) {
        alice.send(`${line}\n`);
        heard.push(...(await batchesUntil(carol.peer, `[alice] ${line}`)));
      }
      first.child.kill(signal);
      for (const peer of [alice, carol.peer]) void peer.ended.promise.then(() => peer.socket.end());
      await first.child.exited;
      expect(fs.readdirSync(file.slice(0, -"/chat.db".length))).toEqual([...files]);
      expect(fs.statSync(file).mode & 0o777).toBe(0o600);

      const second = await serve("--db", file);
      const dave = await follow(second, "dave");
      expect(dave.from).toBe(carol.from);
      const replay = await batchesUntil(dave.peer, "* dave has joined the chat");
      expect(replay.slice(0, heard.length)).toEqual(heard);
    },
  );

  const GARBAGE = Buffer.alloc(4096, "garbage ");
  GARBAGE.writeUInt32BE(0x62756e63, 68);
  const makeWith = (bytes: string | Buffer) => () => {
    const file = newFile();
    fs.writeFileSync(file, bytes);
    return file;
  };

  test.each([
    ["no name", () => "", 2, "--db takes the name of a file. See bun server.ts --help."],
    ["a folder that is missing", () => `${newFile()}/chat.db`, 1, "there is no such folder"],
    ["a folder", () => `${newFile()}/..`, 1, "it is a folder"],
    ["a device", () => "/dev/null", 1, "it is not a file"],
    ["a text", makeWith("My diary\n".repeat(20)), 1, "it belongs to another program"],
    ["a short text", makeWith("x"), 1, "it belongs to another program"],
    [
      "a database of another program",
      () => writeHistory([], { application: 0 }),
      1,
      "it belongs to another program",
    ],
    ["garbage", makeWith(GARBAGE), 1, "it is damaged"],
    [
      "a newer version",
      () => writeHistory([], { version: 4 }),
      1,
      "it was made by a newer version of bun-chat",
    ],
  ])("with %s says what is wrong, and touches nothing", async (_, make, code, reason) => {
    const file = make();
    const parent = file.slice(0, file.lastIndexOf("/"));
    const isOurs = parent.startsWith(folder) && fs.existsSync(parent);
    const before = isOurs && contents(parent);
    const command = [process.execPath, "server.ts", "--port", "0", "--db", file];
    const err = code === 2 ? `${reason}\n` : `${file} cannot be the history: ${reason}.\n`;
    expect(await inPipe(command).result()).toEqual({ code, out: "", err });
    expect(isOurs && contents(parent)).toEqual(before);
  });

  test("says that another server uses the file, and leaves that one alone", async () => {
    const file = newFile();
    const first = await serve("--db", file);
    const second = inPipe([process.execPath, "server.ts", "--port", "0", "--db", file]);
    const err = `${file} cannot be the history: another server uses it.\n`;
    expect(await second.result()).toEqual({ code: 1, out: "", err });
    const { peer: alice } = await follow(first, "alice");
    alice.send("hello\n");
    await batchesUntil(alice, "[alice] hello");
  });

  /**
   * Starts a server that can store about ten batches, each of which takes 4 KiB at first, and talks
   * until it says so. Its clock is ten times as fast, so that it soon tries again.
   */
  async function serveOnFullDisk(file: string) {
    const code = `
      const { now } = performance;
      performance.now = () => 10 * now.call(performance);
      (await import("./server.ts")).main();`;
    const options = ["--port", "0", "--rate", "0", "--quiet", "--db", file];
    const script = `ulimit -S -f 64; trap "" XFSZ; exec "$0" "$@"`;
    const command = [process.execPath, "--eval", code, "--", ...options];
    const server = await serveBy(["bash", "-c", script, ...command]);
    const [alice, bob] = await enterAll(server, "alice", "bob");
    const said: string[] = [];

    async function say(line: string): Promise<void> {
      alice.send(`${line}\n`);
      said.push(`[alice] ${line}`);
      expect(await bob.line()).toBe(`[alice] ${line}`);
    }

    for (const line of numbered(40)) await say(line);
    await server.err.until(/ The history cannot be stored: .*\. The chat goes on\.\n/);
    const limit = (bytes: number | "unlimited") =>
      Bun.spawn(["prlimit", "--pid", `${server.pid}`, `--fsize=${bytes}:unlimited`]).exited;
    // A batch in which nobody says something is smaller, and might still fit in.
    await limit(fs.statSync(`${file}-wal`).size - 3 * 4120); // less than the last three pages
    const makeRoom = () => limit("unlimited");
    return { server, bob, said, say, makeRoom };
  }

  /** What a follower hears before and behind a gap, without arrivals, and where it says to go on. */
  function splitAtGap(heard: readonly string[]) {
    const gaps = heard.filter((line) => SINCE.test(line));
    expect(gaps).toHaveLength(1);

    const [gap = ""] = gaps;
    const place = heard.indexOf(gap);
    const isSaid = (line: string) => line.startsWith("[");
    return {
      before: heard.slice(0, place).filter(isSaid),
      after: heard.slice(place + 1).filter(isSaid),
      from: Number(SINCE.exec(gap)?.[1]),
    };
  }

  test("goes on while the disk is full, and tells what is missing in the history", async () => {
    const { server, bob, said, say, makeRoom } = await serveOnFullDisk(newFile());
    const tries = performance.now() + 250; // time enough for two more tries to store something
    while (performance.now() < tries) await say("still there?");

    const { peer: carol, until } = await follow(server, "carol");
    expect(await bob.line()).toBe("* carol has joined the chat");
    const missed = splitAtGap(await carol.ping());
    expect(await carol.line()).toBe(ANSWERED);
    expect(missed.before.length).toBeWithin(5, 15);
    expect(missed.before).toEqual(said.slice(0, missed.before.length));
    expect(missed.after).toHaveLength(0);
    expect(missed.from).toBeGreaterThan(until); // nothing is known but what comes now

    // There are marks as ever.
    await say("hello");
    const { lines, at } = await nextBatch(carol);
    expect(lines).toEqual(["[alice] hello"]);
    expect(at).toBeGreaterThan(until);

    await makeRoom();
    while (!server.err.text.includes("can be stored again")) await say("again");
    const { peer: dave } = await follow(server, "dave");
    const { before, after } = splitAtGap(await linesUntil(dave, "* dave has joined the chat"));
    expect(before).toEqual(missed.before);
    expect(after).toEqual(said.slice(-after.length));
    expect(after[0]).toBe("[alice] again");

    const problems = server.err.text.trimEnd().split("\n");
    expect(problems.map((line) => line.slice("2026-11-24 10:42:59 ".length))).toEqual([
      expect.stringMatching(/^The history cannot be stored: .*\. The chat goes on\.$/),
      "The history can be stored again. Something is missing in it.",
    ]);
  });

  test.each([
    ["SIGTERM", "there is room again", 0],
    ["SIGTERM", "the disk is still full", 0],
    ["SIGKILL", "the disk is still full", 137],
  ] as const)("knows what is missing after %s when %s", async (signal, state, code) => {
    const file = newFile();
    const { server, said, makeRoom } = await serveOnFullDisk(file);
    if (state === "there is room again") await makeRoom();
    server.child.kill(signal);
    expect(await server.child.exited).toBe(code);

    const { peer: carol } = await follow(await serve("--db", file), "carol");
    const { before } = splitAtGap(await linesUntil(carol, "* carol has joined the chat"));
    expect(before.length).toBeWithin(5, 15);
    expect(before).toEqual(said.slice(0, before.length));
  });
});

// --- 16. Registered names ----------------------------------------------------------------------

describe("a registered name", () => {
  test("is had by its password only", async () => {
    const { room, log } = openLogged({ db: newFile() });
    const [alice, bob] = await enterAll(room, "alice", "bob");
    expect(await answersTo(alice, `/register ${PASSWORD}`)).toEqual([registered("alice")]);
    expect(log.at(-1)).toBe("The name alice has been registered.");
    alice.send("/quit\n");
    expect(await bob.line()).toBe("* alice has left the chat");

    expect(await refusalOf(room, "alice")).toEqual([askedFor("alice")]);
    expect(log.at(-1)).toBe(`Refused 127.0.0.1:PORT: ${askedFor("alice").slice("* ".length)}`);
    expect(await bob.ping()).toEqual([]);

    await enter(room, LOGIN);
    expect(await bob.line()).toBe("* alice has joined the chat");
    expect(namesIn(room)).toEqual(["alice", "bob"]);
  });

  test("is kept in the file", async () => {
    const file = withAlice();
    const room = open({ db: file });
    expect(await refusalOf(room, "alice")).toEqual([askedFor("alice")]);
    const alice = await enter(room, LOGIN);
    expect(await hashOfAlice(room, file, alice)).toMatch(/^\$argon2id\$v=19\$m=19456,t=2,p=1\$/);
  });

  test.each([
    ["no password", "alice", "alice"],
    ["blanks", "alice  \t ", null],
    ["the name in capitals", "ALICE", "ALICE"],
    ["a wrong password", "alice correct house", "alice"],
    ["the password in capitals", "alice CORRECT HORSE", "alice"],
    ["a blank before it", `alice  ${PASSWORD}`, "alice"],
    ["a blank behind it", `${LOGIN} `, "alice"],
    ["another blank in it", "alice correct  horse", "alice"],
    ["a part of it", "alice correct", "alice"],
    ["its hash", "alice $argon2id$v=19$m=19456,t=2,p=1$", "alice"],
  ])("is refused for %s", async (_, firstLine, name) => {
    const room = open({ db: withAlice() });
    const why = name === null ? NAME_RULE : askedFor(name);
    expect(await refusalOf(room, firstLine)).toEqual([why]);
    expect(namesIn(room)).toEqual([]);
  });

  const ACCENTS = "Pässwörd ệ 각";
  test.each([
    ["blanks in it, before and behind it", "  two  blanks  ", "alice   two  blanks  "],
    ["a tab before it", "password", "alice\tpassword"],
    ["the name in capitals", "password", "ALICE password"],
    ["a carriage return", "password", "alice password\r"],
    ["accents apart (NFD)", ACCENTS.normalize("NFC"), `alice ${ACCENTS.normalize("NFD")}`],
    ["accents together (NFC)", ACCENTS.normalize("NFD"), `alice ${ACCENTS.normalize("NFC")}`],
    ["256 characters", "🐎".repeat(256), `alice ${"🐎".repeat(256)}`],
  ])("is had with %s", async (_, password, firstLine) => {
    const room = open({ db: newFile() });
    const alice = await enter(room, "alice");
    expect(await answersTo(alice, `/register ${password}`)).toEqual([registered("alice")]);
    alice.send("/quit\n");
    await alice.rest();
    await enter(room, firstLine);
    expect(namesIn(room)).toEqual([firstLine.startsWith("ALICE") ? "ALICE" : "alice"]);
  });

  test("is had by /nick, too; somebody without the password stays, and keeps the old name", async () => {
    const [bob, carol] = await enterAll(open({ db: withAlice() }), "bob", "carol");
    const why = "* The name alice is registered. Take it with its password: /nick alice PASSWORD";
    for (const command of ["/nick alice", "/nick alice wrong horse", `/nick alice  ${PASSWORD}`])
      expect(await answersTo(bob, command)).toEqual([why]);
    expect(await answersTo(bob, "/who")).toEqual([present("bob", "carol")]);

    bob.send(`/nick ${LOGIN}\n`);
    const news = "* bob is now called alice";
    for (const peer of [bob, carol]) expect(await peer.line()).toBe(news);
  });

  test("needs no password for its owner in the room, who writes it in other letters", async () => {
    const alice = await enter(open({ db: withAlice() }), LOGIN);
    expect(await answersTo(alice, "/nick ALICE")).toEqual(["* alice is now called ALICE"]);
  });

  test.each(["a1ice", "aIice", "аӏісе", "AL1CE"])(
    "is not had by a look-alike while its owner is away: %s",
    async (name) => {
      const room = open({ db: withAlice() });
      const why = `* The name ${name} looks like one that is registered.`;
      expect(await refusalOf(room, name)).toEqual([why]);
      const bob = await enter(room, "bob");
      expect(await answersTo(bob, `/nick ${name}`)).toEqual([why]);
      expect(await refusalOf(room, `${name} ${PASSWORD}`)).toEqual([notRegistered(name)]);
    },
  );

  test("cannot be registered by a look-alike, nor can its owner look like it", async () => {
    const room = open({ db: newFile() });
    const alice = await enter(room, "alice");
    alice.send(`/register ${PASSWORD}\n/nick carol\n`);
    await alice.until("* alice is now called carol");
    for (const name of ["a1ice", "AL1CE"]) {
      const why = `* The name ${name} looks like one that is registered.`;
      expect(await answersTo(alice, `/nick ${name}`)).toEqual([why]);
    }
    // One person may have several names.
    expect(await answersTo(alice, "/register another horse")).toEqual([registered("carol")]);
  });

  test("has a password that its owner can change", async () => {
    const room = open({ db: withAlice() });
    const alice = await enter(room, LOGIN);
    const answer = ["* The password of alice is changed."];
    expect(await answersTo(alice, "/password another horse")).toEqual(answer);
    expect(await refusalOf(room, LOGIN)).toEqual([askedFor("alice")]);
    await enter(room, "alice another horse");
  });

  test("can be given up, and is anybody's then", async () => {
    const { room, log } = openLogged({ db: withAlice() });
    const alice = await enter(room, LOGIN);
    const answer = "The name alice is not registered any more.";
    expect(await answersTo(alice, "/unregister")).toEqual([`* ${answer}`]);
    expect(log.at(-1)).toBe(answer);
    const none = ["* The name alice is not registered."];
    expect(await answersTo(alice, "/unregister")).toEqual(none);
    expect(await answersTo(alice, "/password another horse")).toEqual(none);
    alice.send("/quit\n");
    await alice.rest();

    expect(await refusalOf(room, LOGIN)).toEqual([notRegistered("alice")]);
    const stranger = await enter(room, "a1ice");
    expect(await answersTo(stranger, "/nick alice")).toEqual(["* a1ice is now called alice"]);
  });

  test("is registered once, however often that is said", async () => {
    const room = open({ db: newFile() });
    const alice = await enter(room, "alice");
    alice.send("/register first horse\n/register second horse\n");
    expect(await alice.ping()).toEqual([
      registered("alice"),
      "* The name alice is registered already. /password NEW changes its password.",
    ]);
    expect(await refusalOf(room, "alice second horse")).toEqual([askedFor("alice")]);
    await enter(room, "alice first horse");
  });

  test("is one of five from one address; the next one has to wait for ten minutes", async () => {
    jest.useFakeTimers();
    const room = open({ db: newFile(), rate: 10, maxPerAddress: 9 });
    const alice = await enter(room, "alice");
    const register = async (name: string) => {
      alice.send(`/nick ${name}\n`);
      await alice.until(/ is now called /);
      alice.send(`/register ${PASSWORD}\n`);
      const answer = await alice.line();
      await pass(30); // a try costs as much as one to come in
      return answer;
    };
    const names = ["bob", "carol", "dave", "erin", "frank"];
    for (const name of names) expect(await register(name)).toBe(registered(name));
    const why = "* Too many names were registered from your address. Try again in ten minutes.";
    expect(await register("grace")).toBe(why);
    await pass(450);
    expect(await register("heidi")).toBe(registered("heidi"));
    expect(await register("ivan")).toBe(why);
  });

  test("is only in a file: without one, people are told how to start a server with it", async () => {
    const room = open();
    const alice = await enter(room, "alice");
    const why =
      "* This room forgets everything when it stops. One that keeps names is started like this: bun server.ts --db chat.sqlite";
    for (const command of ["/register password", "/register", "/password password", "/unregister"])
      expect(await answersTo(alice, command)).toEqual([why]);
    expect(await refusalOf(room, "bob password")).toEqual([notRegistered("bob")]);
    const none =
      "* The name bob is not registered, so it has no password. Take it alone: /nick bob";
    expect(await answersTo(alice, "/nick bob password")).toEqual([none]);
  });

  const LENGTHS = "* A password has 8 to 256 characters.";
  test.each([
    ["nothing", "", null],
    ["blanks", "         ", null],
    ["too little", "1234567", LENGTHS],
    ["too little, which takes many bytes", "🐎".repeat(7), LENGTHS],
    ["too much", "x".repeat(257), LENGTHS],
    ["the end of an HTTP request", "/index HTTP/1.1", "* A password does not end like that."],
    ["the end of an HTTP/2 request", "/index HTTP/2", "* A password does not end like that."],
  ])("cannot have this as its password: %s", async (_, password, why) => {
    const bob = await enter(open({ db: newFile() }), "bob");
    for (const usage of ["/register PASSWORD", "/password NEW"]) {
      const command = usage.replace(/[A-Z]+/, password);
      const answer = why ?? `* Say it like this: ${usage}`;
      expect(await answersTo(bob, command)).toEqual([answer]);
    }
    expect(await answersTo(bob, "/unregister")).toEqual(["* The name bob is not registered."]);
  });

  test("is not had by the request of a web page, even if it is GET", async () => {
    const { room, log } = openLogged({ db: newFile() });
    const get = await enter(room, "GET");
    expect(await answersTo(get, `/register ${PASSWORD}`)).toEqual([registered("GET")]);
    get.send("/quit\n");
    await get.rest();
    expect(await refusalOf(room, "GET / HTTP/1.1\r\nHost: x\r\n\r")).toEqual([NAME_RULE]);
    expect(log.at(-1)).toBe(`Refused 127.0.0.1:PORT: ${NAME_RULE.slice("* ".length)}`);
    await enter(room, `GET ${PASSWORD}`);
  });
});

describe("the owner of a name who comes in twice", () => {
  const LEFT = "* alice has left the chat (came in from elsewhere)";

  test.each([
    ["by a first line", "alice", "joined the chat"],
    ["by /nick", "carol", "carol"],
  ])("%s is the one who stays", async (_, name) => {
    const [room, alice, bob] = await gather(open({ db: withAlice() }), LOGIN, "bob");
    if (name === "alice") {
      await enter(room, LOGIN);
      expect(await bob.lines(2)).toEqual([LEFT, "* alice has joined the chat"]);
    } else {
      const carol = await enter(room, name);
      expect(await bob.line()).toBe("* carol has joined the chat");
      carol.send(`/nick ${LOGIN}\n`);
      const news = [LEFT, "* carol is now called alice"];
      for (const peer of [bob, carol]) expect(await peer.lines(2)).toEqual(news);
    }
    const told = (await alice.rest()).filter((line) => !line.startsWith("* carol has joined"));
    expect(told).toEqual(["* You have come in from elsewhere."]);
    expect(namesIn(room)).toEqual(["alice", "bob"]);
  });

  test("is told which lines came too late", async () => {
    jest.useFakeTimers();
    const [room, alice, bob] = await gather(open({ db: withAlice(), rate: 10 }), LOGIN, "bob");
    alice.send("flood\n".repeat(NEWCOMER_LINES + 5));
    await bob.lines(NEWCOMER_LINES);
    await enter(room, LOGIN);
    expect(await alice.rest()).toEqual([
      "* Your last lines came too late: 5 or more.",
      "* You have come in from elsewhere.",
    ]);
    expect(await bob.lines(2)).toEqual([LEFT, "* alice has joined the chat"]);
  });
});

describe("while a password is looked at", () => {
  test("lines behind it wait, and come in order", async () => {
    const [room, bob] = await gather(open({ db: withAlice() }), "bob");
    const held = holdPasswords();
    const alice = await greeted(room);
    alice.send(`${LOGIN}\none\n`);
    await held.begun;
    alice.send("two\n");
    bob.send("still alone\n");
    expect(await answersTo(bob, "/who")).toEqual([present("bob")]);
    held.goOn();
    const heard = ["* alice has joined the chat", "[alice] one", "[alice] two"];
    expect(await bob.lines(3)).toEqual(heard);
    expect(await alice.ping()).toEqual(["* The room contains: bob"]);
  });

  test.each([
    ["/register", "bob", "/register another horse", registered("bob")],
    ["/password", LOGIN, "/password another horse", "* The password of alice is changed."],
    ["/nick", "bob", `/nick ${LOGIN}`, "* bob is now called alice"],
  ])("lines behind %s wait, and the room does not", async (_, firstLine, command, answer) => {
    const [room, carol, peer] = await gather(open({ db: withAlice() }), "carol", firstLine);
    const held = holdPasswords();
    peer.send(`${command}\nlater\n`);
    await held.begun;
    carol.send("now\n");
    expect(await peer.line()).toBe("[carol] now");
    expect(await carol.ping()).toEqual([]);
    held.goOn();
    expect(await peer.line()).toBe(answer);
    await carol.until(/^\[\w+\] later$/);
    expect(room.clients).toHaveLength(2);
  });

  test("a FIN is no matter: what was said before it is heard", async () => {
    const [room, bob] = await gather(open({ db: withAlice() }), "bob");
    const held = holdPasswords();
    const alice = await greeted(room);
    alice.send(`${LOGIN}\nhello\n`);
    alice.socket.shutdown();
    await held.begun;
    await turns(50);
    held.goOn();
    expect(await alice.rest()).toEqual(["* The room contains: bob"]);
    const heard = ["* alice has joined the chat", "[alice] hello", "* alice has left the chat"];
    expect(await bob.lines(3)).toEqual(heard);
  });

  test.each([
    ["of a stranger", null],
    ["in the room", "mallory"],
  ])("a reset %s is no matter, and nobody comes in by it", async (_, name) => {
    const [room, bob] = await gather(open({ db: withAlice() }), "bob");
    const alice = name === null ? await greeted(room) : await enter(room, name);
    const held = holdPasswords();
    alice.send(name === null ? `${LOGIN}\nhello\n` : `/nick ${LOGIN}\nhello\n`);
    await held.begun;
    alice.socket.terminate();
    while (room.memoryUsed > 0) await turns(1);
    await turns(5);
    held.goOn();
    await enter(room, "carol");
    const heard = await bob.until("* carol has joined the chat");
    expect(heard).not.toContain("* mallory is now called alice");
    expect(heard).not.toContain("* alice has joined the chat");
    expect(namesIn(room)).toEqual(["bob", "carol"]);
  });

  test("the minute for a name does not run, and nothing is forgotten after it", async () => {
    jest.useFakeTimers();
    const room = open({ db: withAlice() });
    const held = holdPasswords();
    const alice = await greeted(room);
    alice.send(`${LOGIN}\n`);
    await held.begun;
    await pass(130);
    expect(alice.isOpen).toBe(true);
    held.goOn();
    expect(await alice.line()).toBe("* The room contains: ");
    await pass(130);
    expect(await alice.ping()).toEqual([]);
  });

  test("the server stops, and tells the one who waits", async () => {
    const file = withAlice();
    const room = open({ db: file });
    const bob = await enter(room, "bob");
    const held = holdPasswords();
    const alice = await greeted(room);
    bob.send("/register another horse\n");
    await held.begun;
    alice.send(`${LOGIN}\n`);
    const stopped = room.stop();
    expect(await alice.rest()).toEqual([SHUTDOWN]);
    const late = "* Your last lines may have come too late.";
    expect(await bob.rest()).toEqual([late, SHUTDOWN]);
    for (const peer of [alice, bob]) peer.socket.end();
    await stopped;
    held.goOn();
    await turns(5);
    await enter(open({ db: file }), "bob"); // has not been registered
  });

  test("a follower waits for the answer, too", async () => {
    const [room, bob] = await gather(open({ db: newFile() }), "bob");
    const { peer: carol } = await follow(room, "carol");
    await batchesUntil(carol, "* carol has joined the chat");
    const held = holdPasswords();
    carol.send("/register another horse\n/register\n");
    await held.begun;
    bob.send("hello\n");
    expect((await nextBatch(carol)).lines).toEqual(["[bob] hello"]);
    held.goOn();
    expect(await carol.lines(4)).toEqual([
      registered("carol"),
      ANSWERED,
      "* Say it like this: /register PASSWORD",
      ANSWERED,
    ]);
  });

  test("its owner changes it: the old one does not get in", async () => {
    const [room, alice] = await gather(open({ db: withAlice() }), LOGIN);
    const held = holdPasswords();
    alice.send("/password another horse\n");
    await held.begun;
    const late = await greeted(room);
    late.send(`${LOGIN}\nhello\n`);
    while (room.memoryUsed === 0) await turns(1); // what is behind the password waits now
    held.goOn();
    expect(await late.rest()).toEqual([askedFor("alice")]);
    expect(await alice.ping()).toEqual(["* The password of alice is changed."]);
  });

  test("its owner gives the name up: the old one does not get in", async () => {
    const [room, alice] = await gather(open({ db: withAlice() }), LOGIN);
    const held = holdPasswords();
    const late = await greeted(room);
    late.send(`${LOGIN}\nhello\n`);
    await held.begun;
    const answer = "* The name alice is not registered any more.";
    expect(await answersTo(alice, "/unregister")).toEqual([answer]);
    held.goOn();
    expect(await late.rest()).toHaveLength(1);
    expect(await alice.ping()).toEqual([]);
  });
});

describe("guessing a password", () => {
  const WRONG = "alice wrong horse";

  /** A file whose hash takes no time, for tests that try many passwords. */
  const withCheapHash = async () => {
    const how = { algorithm: "argon2id", memoryCost: 8, timeCost: 1 } as const;
    return withHash(await Bun.password.hash(PASSWORD, how));
  };

  /** So many try to come in at once. Resolves when all have given their first line. */
  async function guess(room: Server, count: number, firstLine = WRONG): Promise<Peer[]> {
    const guessers = await Promise.all(times(count, () => greeted(room)));
    for (const guesser of guessers) guesser.send(`${firstLine}\n`);
    return guessers;
  }

  /** Counts the peers that were told that they are wrong. */
  const countRefused = (guessers: readonly Peer[]) =>
    guessers.filter(({ isOpen }) => !isOpen).length;

  /** Waits until so many have been told, and sees that nobody else is. */
  async function refusedAre(guessers: readonly Peer[], count: number): Promise<void> {
    while (countRefused(guessers) < count) await turns(1);
    await turns(100);
    expect(countRefused(guessers)).toBe(count);
  }

  /** Enters as alice, from another address, and says hello. */
  function enterFromElsewhere(room: Server): void {
    const from = { host: "127.0.0.1", port: room.port, localAddress: "127.0.0.2" };
    const alice = createConnection(from);
    cleanups.push(() => alice.destroy());
    alice.write(`${LOGIN}\nhello\n`);
  }

  test("waits after ten tries of one address, each for three seconds", async () => {
    jest.useFakeTimers();
    const room = open({ db: await withCheapHash() });
    const guessers = await guess(room, 12);
    await refusedAre(guessers, 10);
    await pass(2.9);
    await refusedAre(guessers, 10);
    await pass(0.1);
    await refusedAre(guessers, 11);
    await pass(2.9);
    await refusedAre(guessers, 11);
    await pass(0.1);
    await refusedAre(guessers, 12);
    expect(namesIn(room)).toEqual([]);
  });

  test("does not keep the owner out, who comes from elsewhere", async () => {
    jest.useFakeTimers();
    const [room, bob] = await gather(open({ db: await withCheapHash() }), "bob");
    const guessers = await guess(room, 15);
    await refusedAre(guessers, 10);

    enterFromElsewhere(room);
    expect(await bob.line()).toBe("* alice has joined the chat");
    expect(await bob.line()).toBe("[alice] hello");
    expect(countRefused(guessers)).toBe(10);
  });

  test("comes after those who have tried less, at other addresses", async () => {
    const [room, bob] = await gather(open({ db: await withCheapHash() }), "bob");
    const held = holdPasswords();
    const guessers = await guess(room, 5);
    await held.begun;
    enterFromElsewhere(room);
    while (room.memoryUsed === 0) await turns(1); // what is behind the password waits now
    held.goOn();
    await bob.until("[alice] hello");
    await refusedAre(guessers, 5);
    expect(held.tried.slice(0, 2)).toEqual(["wrong horse", PASSWORD]);
  });

  test("gives a right one its try back, so nobody who knows it waits", async () => {
    jest.useFakeTimers();
    const room = open({ db: await withCheapHash() });
    await refusedAre(await guess(room, 9), 9);
    for (let time = 0; time < 3; time++) await enter(room, LOGIN);
    const guessers = await guess(room, 2);
    await refusedAre(guessers, 1);
  });

  test("by /nick costs the same, and the rest of the line waits for it", async () => {
    jest.useFakeTimers();
    const [room, bob, carol] = await gather(open({ db: await withCheapHash() }), "bob", "carol");
    await refusedAre(await guess(room, 9), 9);
    bob.send("/nick alice wrong horse\n/nick alice wrong horse\nhello\n");
    await bob.line();
    expect(await carol.ping()).toEqual([]);
    await pass(3);
    expect(await carol.line()).toBe("[bob] hello");
  });

  test("at forty places at once disturbs nobody in the room", async () => {
    jest.useFakeTimers();
    const room = open({ db: withAlice() });
    const [alice, bob, carol] = await enterAll(room, LOGIN, "bob", "carol");
    const guessers = await guess(room, 40);
    const talk = async (): Promise<void> => {
      for (const line of numbered(100)) {
        alice.send(`${line}\n`);
        for (const peer of [bob, carol]) expect(await peer.line()).toBe(`[alice] ${line}`);
      }
    };
    await Promise.all([talk(), refusedAre(guessers, 10)]);
    for (const peer of [bob, carol]) expect(await peer.ping()).toEqual([]);
    expect(namesIn(room)).toEqual(["alice", "bob", "carol"]);
  });
});

describe("a hash in the file", () => {
  const TODAY = /^\$argon2id\$v=19\$m=19456,t=2,p=1\$/;

  test.each([
    ["less memory and time", { algorithm: "argon2id", memoryCost: 8192, timeCost: 1 }],
    ["less time", { algorithm: "argon2id", memoryCost: 19_456, timeCost: 1 }],
    ["less memory", { algorithm: "argon2id", memoryCost: 19_000, timeCost: 2 }],
    ["another algorithm", { algorithm: "argon2i", memoryCost: 19_456, timeCost: 2 }],
    ["bcrypt", { algorithm: "bcrypt", cost: 4 }],
  ] as const)("of %s is made anew when its owner comes in", async (_, how) => {
    const old = await Bun.password.hash(PASSWORD, how);
    const file = withHash(old);
    const room = open({ db: file });
    expect(await refusalOf(room, "alice wrong horse")).toEqual([askedFor("alice")]);
    const alice = await enter(room, LOGIN);
    const again = await enter(room, LOGIN); // by the new one
    expect(await hashOfAlice(room, file, alice, again)).toMatch(TODAY);
  });

  test.each([
    ["that is good", { memoryCost: 19_456, timeCost: 2 }],
    ["that is better", { memoryCost: 20_000, timeCost: 3 }],
  ])("%s stays, as it does when a wrong password comes", async (_, how) => {
    const old = await Bun.password.hash(PASSWORD, { algorithm: "argon2id", ...how });
    const file = withHash(old);
    const room = open({ db: file });
    const alice = await enter(room, LOGIN);
    expect(await hashOfAlice(room, file, alice)).toBe(old);
  });

  test("that is weak stays when a wrong password comes", async () => {
    const old = await Bun.password.hash(PASSWORD, { algorithm: "bcrypt", cost: 4 });
    const file = withHash(old);
    const room = open({ db: file });
    await refusalOf(room, "alice wrong horse");
    expect(await hashOfAlice(room, file)).toBe(old);
  });

  test.each([
    "",
    "nonsense",
    "$argon2id$v=19$m=19456,t=2,p=1$",
    "$argon2id$v=19$m=0,t=0,p=0$YQ$YQ",
    "$2b$04$x",
  ])("that cannot be read fits no password: %j", async (hash) => {
    const room = open({ db: withHash(hash) });
    expect(await refusalOf(room, LOGIN)).toEqual([askedFor("alice")]);
    expect(await refusalOf(room, `alice x${hash}`)).toEqual([askedFor("alice")]);
  });
});

describe("from another machine", () => {
  const UNSAFE =
    "* Passwords are taken only under TLS, or on the machine of the server: others could read them on their way.";
  const UNSAFE_NAME =
    "* The name alice is registered, and passwords are taken only under TLS, or on the machine of the server.";
  const KEPT =
    "* The name oscar is kept for an operator, who registers it on the machine of the server.";

  test.each([
    ["a registered name", "alice", UNSAFE_NAME],
    ["a registered name with its password", LOGIN, UNSAFE],
    ["a name with a password that it has not", "bob password", UNSAFE],
    ["a name that is kept for an operator", "Oscar", KEPT.replace("oscar", "Oscar")],
  ])("%s is refused without TLS", async (_, firstLine, why) => {
    for (const address of [FAR, "2001:db8::7", "::ffff:203.0.113.7"]) {
      const openFar = openFrom({ address });
      const room = openFar({ db: withAlice(), operators: ["oscar"] });
      expect(await refusalOf(room, firstLine)).toEqual([why]);
    }
  });

  test.each([
    ["/register password", UNSAFE],
    ["/password password", UNSAFE],
    ["/nick alice", UNSAFE_NAME],
    [`/nick ${LOGIN}`, UNSAFE],
    ["/nick oscar", KEPT],
  ])("%s is refused without TLS", async (command, why) => {
    const openFar = openFrom({ address: FAR });
    const bob = await enter(openFar({ db: withAlice(), operators: ["oscar"] }), "bob");
    expect(await answersTo(bob, command)).toEqual([why]);
    expect(await answersTo(bob, "/who")).toEqual([present("bob")]);
  });

  test("all of that is possible with TLS, but to become an operator", async () => {
    const openFar = openFrom({ address: FAR }, openTls);
    const room = openFar({ db: withAlice(), operators: ["oscar"] });
    expect(await refusalOf(room, "alice")).toEqual([askedFor("alice")]);
    const alice = await enter(room, LOGIN);
    const changed = "* The password of alice is changed.";
    expect(await answersTo(alice, "/password another horse")).toEqual([changed]);
    expect(await answersTo(alice, "/nick bob")).toEqual(["* alice is now called bob"]);
    expect(await answersTo(alice, "/register password")).toEqual([registered("bob")]);
    alice.send("/nick alice another horse\n");
    expect(await alice.line()).toBe("* bob is now called alice");
    expect(await answersTo(alice, "/nick oscar")).toEqual([KEPT]);
    expect(await refusalOf(room, "oscar")).toEqual([KEPT]);
  });

  test.each(["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])(
    "it does not come from %s, where all of that is possible",
    async (address) => {
      const openNear = openFrom({ address });
      const room = openNear({ db: withAlice(), operators: ["oscar"] });
      const alice = await enter(room, LOGIN);
      alice.send("/nick oscar\n");
      expect(await alice.line()).toBe("* alice is now called oscar");
      expect(await answersTo(alice, `/register ${PASSWORD}`)).toEqual([registered("oscar")]);
    },
  );
});

describe("a password", () => {
  const SECRET = "Zebra-42"; // no name, so that nobody is called so
  const SHORT = SECRET.slice(0, 7);

  test.each([
    ["that is registered", ["bob", `/register ${SECRET}`, `/nick carol`, `/nick bob ${SECRET}`]],
    ["of a new kind", [LOGIN, `/password ${SECRET}`]],
    ["behind a misspelt command", ["bob", `/regster ${SECRET}`, `/registerr ${SECRET}`]],
    ["behind a command without a blank", ["bob", `/register${SECRET}`]],
    ["behind /Register", ["bob", `/Register ${SECRET}`, `/PASSWORD ${SECRET}`]],
    ["before its name", [`${SECRET} alice`]],
    ["before its name in /nick", ["bob", `/nick ${SECRET} alice`, `/nick ${SECRET}`]],
    ["of a name that is not registered", [`bob ${SECRET}`]],
    ["alone", [SECRET]],
    ["behind a name that is none", [`a,b ${SECRET}`]],
    ["that is wrong", [`alice ${SECRET}`]],
    ["of a look-alike", [`a1ice ${SECRET}`]],
    ["behind /nick", ["bob", `/nick alice ${SECRET}`, `/nick carol ${SECRET}`]],
    ["of a name that is not the person's", ["bob", `/password ${SECRET}`]],
    ["as a command before the name", [`/register ${SECRET}`]],
    ["as another one", [`/nick alice ${SECRET}`]],
    ["behind /unregister", ["bob", `/unregister ${SECRET}`]],
    ["behind commands for others", ["bob", `/kick ${SECRET}`, `/ban ${SECRET}`, `/msg ${SECRET}`]],
    ["that is too short", ["bob", `/register ${SHORT}`, `/password ${SHORT}`]],
    ["that is too long", ["bob", `/register ${SECRET.repeat(40)}`]],
    ["that is much too long", [`alice ${SECRET.repeat(300)}`]],
    ["that ends like an HTTP request", [`alice ${SECRET} HTTP/1.1`]],
  ])("%s is in no log, no history and no file", async (_, lines) => {
    const file = withAlice();
    await expectNowhere(openLogged({ db: file }), lines, file);
  });

  test.each([
    ["as a first line", [`alice ${SECRET}`]],
    ["behind a command", ["bob", `/register ${SECRET}`, `/nick alice ${SECRET}`]],
  ])("that comes over a bad connection is not there, either: %s", async (_, lines) => {
    const file = withAlice();
    const openFar = openFrom({ address: FAR });
    await expectNowhere(openLogged({ db: file }, openFar), lines, file);
  });

  test.each([
    ["as a first line", [`bob ${SECRET}`]],
    ["behind a command", ["bob", `/register ${SECRET}`, `/password ${SECRET}`]],
  ])("is in no log and no history of a room without a file: %s", async (_, lines) => {
    await expectNowhere(openLogged(), lines);
  });

  /** Sees that these lines, when they are said, leave no trace of the password. */
  async function expectNowhere(
    { room, log, problems }: ReturnType<typeof openLogged>,
    lines: readonly string[],
    file?: string,
  ): Promise<void> {
    const witness = await enter(room, "witness");
    const peer = await greeted(room);
    for (const line of lines) peer.send(`${line}\n`);
    peer.send("/quit\n");
    await peer.rest();

    witness.send("the end\n/who\n/history 200\n/since 0\n");
    const heard = await witness.until("[witness] the end");
    const traces = [...log, ...problems, ...heard].join("\n");
    for (const part of ["Received message", "1 person is here: ", " [witness] the end", "Since"])
      expect(traces).toContain(part);
    expect(traces).not.toContain(SHORT);

    // By another process: to read the file in this one would take away its lock.
    if (file === undefined) return;
    const search = (text: string) =>
      Bun.spawnSync(["grep", "-qs", text, file, `${file}-wal`]).exitCode === 0;
    expect([search("the end"), search(SHORT)]).toEqual([true, false]);
    for (const client of [peer, witness]) client.socket.terminate();
    await room.stop();
    expect([search("the end"), search(SHORT)]).toEqual([true, false]);
  }
});

// --- 17. Operators -----------------------------------------------------------------------------

/** Opens a room in which alice is an operator, with two other people. */
async function openWithOperator(options: Partial<ServerOptions> = {}) {
  const { room, log } = openLogged({ db: withAlice(), operators: ["alice"], ...options });
  const [alice, bob, carol] = await enterAll(room, LOGIN, "bob", "carol");
  await alice.ping();
  await bob.ping();
  return { room, log, alice, bob, carol };
}

const COMMANDS_OF_OPERATORS = ["/kick", "/ban", "/bans", "/unban"];

describe("an operator", () => {
  test.each([
    ["/kick bob", "kicked by alice"],
    ["/KICK BOB", "kicked by alice"],
    ["/kick bob  is  loud ", "kicked by alice: is  loud"],
    ["/ban bob", "banned by alice for 60 minutes"],
    ["/ban bob 1", "banned by alice for 1 minute"],
    ["/ban  ｂob  525600 ", "banned by alice for 525600 minutes"],
  ])("shows somebody out by %s, and everybody hears why", async (command, how) => {
    const { log, alice, bob, carol } = await openWithOperator();
    bob.send("before\n");
    expect(await carol.line()).toBe("[bob] before");
    alice.send(`${command}\n`);
    expect(await bob.rest()).toEqual([`* You were ${how}`]);
    const news = `* bob has left the chat (${how})`;
    expect(await carol.line()).toBe(news);
    expect(await alice.ping()).toEqual(["[bob] before", news]);
    expect(log.at(-1)).toBe(`Removing user: bob from clients (${how})`);
  });

  const USAGE_OF_BAN = "* Say it like this: /ban NAME MINUTES, with 1 to 525600 minutes";
  const MISTAKES: [command: string, answer: string][] = [
    ["/kick", "* Say it like this: /kick NAME REASON"],
    ["/kick dave", "* Nobody here is called dave."],
    ["/kick b0b", "* Nobody here is called b0b."],
    ["/ban", USAGE_OF_BAN],
    ["/ban bob 0", USAGE_OF_BAN],
    ["/ban bob -1", USAGE_OF_BAN],
    ["/ban bob 1.5", USAGE_OF_BAN],
    ["/ban bob 525601", USAGE_OF_BAN],
    ["/ban bob 9999999", USAGE_OF_BAN],
    ["/ban bob ever", USAGE_OF_BAN],
    ["/ban bob 5 minutes", USAGE_OF_BAN],
    ["/ban dave", "* Nobody here is called dave."],
    ["/unban", "* Say it like this: /unban NAME"],
    ["/unban bob", "* bob is not banned."],
    ["/bans", "* Nobody is banned."],
  ];
  test("is told what is wrong with a command, and nobody else hears it", async () => {
    const { room, alice, carol } = await openWithOperator();
    for (const [command, answer] of MISTAKES)
      expect([command, ...(await answersTo(alice, command))]).toEqual([command, answer]);
    expect(await carol.ping()).toEqual([]);
    expect(namesIn(room)).toEqual(["alice", "bob", "carol"]);
  });

  test("tells with /who is banned, and lets them in again", async () => {
    const { room, log, alice, bob, carol } = await openWithOperator();
    alice.send("/ban bob 90\n/ban carol 1\n");
    await Promise.all([bob.rest(), carol.rest()]);
    await alice.lines(2);
    expect(await answersTo(alice, "/bans")).toEqual([
      "* bob is banned for another 90 minutes",
      "* carol is banned for another 1 minute",
    ]);
    const why = "* You are banned for another 90 minutes.";
    expect(await refusalOf(room, "bob")).toEqual([why]);
    expect(log.at(-1)).toBe(`Refused 127.0.0.1:PORT: ${why.slice("* ".length)}`);

    const news = "The server says: bob is not banned any more (unbanned by alice).";
    expect(await answersTo(alice, "/unban BOB")).toEqual([`* ${news}`]);
    expect(log.at(-1)).toBe(news);
    await enter(room, "bob");
    expect(await refusalOf(room, "carol")).toHaveLength(1);
    expect(await answersTo(alice, "/bans")).toHaveLength(2); // and bob's arrival
  });

  test("is told of the commands, which nobody else has or hears of", async () => {
    const { room, alice, bob, carol } = await openWithOperator();
    expect(await answersTo(bob, `/register ${PASSWORD}`)).toEqual([registered("bob")]);
    const namesOf = (help: readonly string[]) => help.map((line) => line.split(" ")[1] ?? "");
    const ofBob = namesOf(await answersTo(bob, "/help"));
    const ofAlice = namesOf(await answersTo(alice, "/help"));
    expect(ofAlice).toEqual([...ofBob.slice(0, -1), ...COMMANDS_OF_OPERATORS, "//TEXT"]);
    for (const command of [...COMMANDS_OF_OPERATORS, "/say"]) {
      const why = `* Unknown command ${command}. Try /help.`;
      expect(await answersTo(bob, `${command} carol`)).toEqual([why]);
    }
    expect(await carol.ping()).toEqual([]);
    expect(namesIn(room)).toEqual(["alice", "bob", "carol"]);
  });

  const isOperator = async (peer: Peer) => {
    const [answer = ""] = await answersTo(peer, "/bans");
    return !answer.startsWith("* Unknown command");
  };

  test("is one only under that name", async () => {
    const { alice } = await openWithOperator();
    expect(await isOperator(alice)).toBe(true);
    alice.send("/nick anna\n");
    await alice.line();
    expect(await isOperator(alice)).toBe(false);
    alice.send(`/nick ALICE ${PASSWORD}\n`);
    await alice.line();
    expect(await isOperator(alice)).toBe(true);
  });

  test("is nobody who has not registered the name, nor one who looks like it", async () => {
    const { room, log } = openLogged({ db: newFile(), operators: ["oscar", "alice"] });
    expect(log.slice(0, 2)).toEqual(
      ["oscar", "alice"].map(
        (name) =>
          `The operator ${name} is not registered yet: enter as ${name} on this machine, and say /register PASSWORD.`,
      ),
    );
    const oscar = await enter(room, "Oscar");
    expect(await isOperator(oscar)).toBe(false);
    oscar.send("/quit\n");
    await oscar.rest();

    const second = await enter(room, "oscar");
    expect(await isOperator(second)).toBe(false);
    expect(await answersTo(second, `/register ${PASSWORD}`)).toEqual([registered("oscar")]);
    expect(await isOperator(second)).toBe(true);
    second.send("/quit\n");
    await second.rest();

    expect(await refusalOf(room, "oscar")).toEqual([askedFor("oscar")]);
    expect(await refusalOf(room, "0scar")).toHaveLength(1);
    expect(await isOperator(await enter(room, "alice"))).toBe(false);
  });

  test("cannot give the name up, which somebody else could register then", async () => {
    const { room, alice } = await openWithOperator();
    const why = "* Operators keep their names, until the server is started without them.";
    expect(await answersTo(alice, "/unregister")).toEqual([why]);
    expect(await refusalOf(room, "alice")).toEqual([askedFor("alice")]);
  });

  test("is told at the start who has to register, and not of others", () => {
    const { log } = openLogged({ db: withAlice(), operators: ["ALICE"] });
    expect(log).toEqual([]);
  });

  test("who shows somebody out tells which lines came too late", async () => {
    jest.useFakeTimers();
    const { alice, bob, carol } = await openWithOperator({ rate: 10 });
    bob.send("flood\n".repeat(50));
    await carol.until("[bob] flood");
    await carol.ping();
    alice.send("/kick bob\n");
    const told = await bob.rest();
    expect(told).toEqual([
      expect.stringMatching(/^\* Your last lines came too late: \d\d or more\.$/),
      "* You were kicked by alice",
    ]);
  });
});

describe("a ban", () => {
  const BANNED = "* You are banned for another 60 minutes.";

  /** Opens a room in which bob, who came from another machine, is banned. */
  async function openBanned(options: Partial<ServerOptions> = {}, openRoom = open) {
    const place = { address: FAR };
    const openFar = openFrom(place, openRoom);
    const { room, log } = openLogged({ db: withAlice(), ...options }, openFar);
    const bob = await enter(room, "bob");
    expect(room.command("/ban bob")).toBe("");
    expect(await bob.rest()).toEqual(["* You were banned by the server for 60 minutes"]);

    /** Gives a first line, from an address. */
    async function comeFrom(address: string, firstLine: string): Promise<string | null> {
      place.address = address;
      const peer = await greeted(room);
      peer.send(`${firstLine}\n`);
      return await peer.lineOrEnd();
    }
    return { room, log, place, comeFrom };
  }

  test.each([
    ["the name", "203.0.113.8", "bob"],
    ["the name in capitals", "203.0.113.8", "BOB"],
    ["a name that looks like it", "203.0.113.8", "b0b"],
    ["the address", FAR, "carol"],
    ["the address in another form", `::ffff:${FAR}`, "carol"],
    ["both", FAR, "bob"],
  ])("holds for %s", async (_, address, name) => {
    const { room, comeFrom } = await openBanned();
    expect(await comeFrom(address, name)).toBe(BANNED);
    expect(namesIn(room)).toEqual([]);
    expect(room.command("/bans")).toBe(`* bob from ${FAR} is banned for another 60 minutes`);
  });

  test("does not hold for others at other addresses, and ends by /unban everywhere", async () => {
    const { room, comeFrom } = await openBanned();
    expect(await comeFrom("203.0.113.8", "carol")).toStartWith("* The room contains: ");
    expect(room.command("/unban bob")).toBe("");
    expect(await comeFrom(FAR, "dave")).toStartWith("* The room contains: ");
    expect(await comeFrom("203.0.113.8", "bob")).toStartWith("* The room contains: ");
  });

  test.each(["127.0.0.1", "::1", "::ffff:127.0.0.1"])(
    "of somebody on this machine does not hold for the others there: %s",
    async (address) => {
      const openNear = openFrom({ address });
      const room = openNear();
      const bob = await enter(room, "bob");
      room.command("/ban bob");
      await bob.rest();
      expect(room.command("/bans")).toBe("* bob is banned for another 60 minutes");
      expect(await refusalOf(room, "bob")).toEqual([BANNED]);
      await enter(room, "carol");
    },
  );

  test("of an IPv6 address holds for its whole site", async () => {
    const place = { address: "2001:db8:1:2:3:4:5:6" };
    const openFar = openFrom(place);
    const room = openFar();
    const bob = await enter(room, "bob");
    room.command("/ban bob");
    await bob.rest();
    place.address = "2001:db8:1:2::1";
    expect(await refusalOf(room, "carol")).toEqual([BANNED]);
    place.address = "2001:db8:1:3::1";
    await enter(room, "carol");
  });

  test("does not hold for an operator at that address, but for others with a password", async () => {
    const { room, comeFrom } = await openBanned({ operators: ["alice"] }, openTls);
    expect(await comeFrom(FAR, LOGIN)).toStartWith("* The room contains: ");
    expect(namesIn(room)).toEqual(["alice"]);
  });

  test("holds for a right password: nobody else has to go for it", async () => {
    const { room, place, comeFrom } = await openBanned({}, openTls);
    place.address = "203.0.113.8";
    const alice = await enter(room, LOGIN);
    expect(await comeFrom(FAR, LOGIN)).toBe(BANNED);
    expect(await alice.ping()).toEqual([]);
    expect(namesIn(room)).toEqual(["alice"]);
  });

  test.each(["bob", "B0B"])("holds for %s when it is wanted by /nick", async (name) => {
    const { room, place } = await openBanned();
    place.address = "203.0.113.8";
    const carol = await enter(room, "carol");
    const why = `* The name ${name} is banned for another 60 minutes.`;
    expect(await answersTo(carol, `/nick ${name}`)).toEqual([why]);
    expect(await answersTo(carol, "/nick dave")).toEqual(["* carol is now called dave"]);
  });

  test("does not show out others at that address, who may also change their names", async () => {
    const openFar = openFrom({ address: FAR });
    const [room, bob, carol] = await gather(openFar(), "bob", "carol");
    room.command("/ban bob 5");
    await bob.rest();
    await carol.until(/has left/);
    expect(await answersTo(carol, "/nick dave")).toEqual(["* carol is now called dave"]);
  });

  test("ends after its minutes", async () => {
    jest.useFakeTimers();
    const [room, bob] = await gather(open(), "bob");
    room.command("/ban bob 2");
    await bob.rest();
    expect(room.command("/bans")).toBe("* bob is banned for another 2 minutes");
    await pass(61);
    expect(room.command("/bans")).toBe("* bob is banned for another 1 minute");
    await pass(58);
    expect(await refusalOf(room, "bob")).toEqual(["* You are banned for another 1 minute."]);
    await pass(2);
    expect(room.command("/bans")).toBe("* Nobody is banned.");
    await enter(room, "bob");
  });

  test("of somebody who keeps trying is logged each time", async () => {
    const { log, comeFrom } = await openBanned();
    for (let time = 0; time < 3; time++) await comeFrom(FAR, "carol");
    const refused = `Refused ${FAR}:PORT: ${BANNED.slice("* ".length)}`;
    expect(log.filter((line) => line === refused)).toHaveLength(3);
  });
});

describe("the terminal of the server", () => {
  const USAGE_OF_BAN = "* Say it like this: /ban NAME MINUTES, with 1 to 525600 minutes";
  const FORBIDDEN = "* What is typed here is a command. To talk, say /say TEXT.";
  test.each([
    ["/who", "* 1 person is here: bob"],
    [" /WHO ", "* 1 person is here: bob"],
    ["/kick", "* Say it like this: /kick NAME REASON"],
    ["/kick dave", "* Nobody here is called dave."],
    ["/ban bob 0", USAGE_OF_BAN],
    ["/bans", "* Nobody is banned."],
    ["/unban bob", "* bob is not banned."],
    ["/say", "* Say it like this: /say TEXT"],
    ["/say  ", "* Say it like this: /say TEXT"],
    ["/foo bar", "* Unknown command /foo. Try /help."],
    ["/nick server", "* Unknown command /nick. Try /help."],
    ["/register password", "* Unknown command /register. Try /help."],
    ["/", "* Unknown command /. Try /help."],
    ["hello everybody", FORBIDDEN],
    ["", ""],
    ["  \t", ""],
    ["\x1b\r", ""],
  ])("answers %j, and nobody hears it", async (line, answer) => {
    const [room, bob] = await gather(open(), "bob");
    expect(room.command(line)).toBe(answer);
    expect(await bob.ping()).toEqual([]);
  });

  test("has a list of its commands", () => {
    const help = open().command("/help").split("\n");
    const names = help.map((line) => line.split(" ")[1]);
    expect(names).toEqual(["/help", "/who", ...COMMANDS_OF_OPERATORS, "/say"]);
  });

  test("shows people out, and lets them in again", async () => {
    const { room, log } = openLogged();
    const [bob, carol, dave] = await enterAll(room, "bob", "carol", "dave");
    await bob.ping();
    expect(room.command("/kick bob that will do")).toBe("");
    const how = "kicked by the server: that will do";
    expect(await bob.rest()).toEqual([`* You were ${how}`]);
    expect(log.at(-1)).toBe(`Removing user: bob from clients (${how})`);

    expect(room.command("/ban carol 5")).toBe("");
    await carol.rest();
    expect(room.command("/bans")).toBe("* carol is banned for another 5 minutes");
    expect(room.command("/unban carol")).toBe("");
    expect(await dave.lines(3)).toEqual([
      `* bob has left the chat (${how})`,
      "* carol has left the chat (banned by the server for 5 minutes)",
      "* The server says: carol is not banned any more (unbanned by the server).",
    ]);
    expect(await refusalOf(room, "dave")).toEqual(["* The name dave is taken."]);
    for (const name of ["bob", "carol"]) await enter(room, name);
  });

  test("says something to everybody, which is in the history", async () => {
    const { room, log } = openLogged();
    const [alice, bob] = await enterAll(room, "alice", "bob");
    expect(room.command("/say  We stop \x1b[1mat\x07 noon ")).toBe("");
    const said = "The server says: We stop [1mat noon";
    for (const peer of [alice, bob]) expect(await peer.line()).toBe(`* ${said}`);
    expect(log.at(-1)).toBe(said);

    const { peer: carol } = await follow(room, "carol");
    expect(await linesUntil(carol, "* carol has joined the chat")).toContain(`* ${said}`);
    carol.send("/history\n");
    expect(await carol.line()).toBe("* Nothing has been said yet."); // by people
  });
});

describe.concurrent("bun server.ts --operators", () => {
  const COMMAND = [process.execPath, "server.ts", "--port", "0"];

  const NEEDS_DB = "--operators goes together with --db, where names are registered";
  const names = (given: string) =>
    `--operators takes names with commas between them, not ${JSON.stringify(given)}`;
  test.each([
    ["--operators alice", NEEDS_DB],
    ["--operators=", NEEDS_DB],
    ["--operators= --db FILE", names("")],
    ["--operators alice, --db FILE", names("alice,")],
    ["--operators alice;bob --db FILE", names("alice;bob")],
    [`--operators ${"a".repeat(33)} --db FILE`, names("a".repeat(33))],
  ])("is wrong usage: %s", async (options, why) => {
    const file = newFile();
    const words = options.replace("FILE", file).split(" ");
    const result = await inPipe([...COMMAND, ...words]).result();
    expect(result).toEqual({ code: 2, out: "", err: `${why}. See bun server.ts --help.\n` });
    expect(fs.existsSync(file)).toBe(false);
  });

  test("says who has to register, and how", async () => {
    const server = await serve("--db", withAlice(), "--operators", "alice, Øyvind ,Zoe\u0308");
    const hints = server.out.text.matchAll(/ (The operator .*)\n/g);
    expect(Array.from(hints, ([, hint]) => hint)).toEqual(
      ["Øyvind", "Zoë"].map(
        (name) =>
          `The operator ${name} is not registered yet: enter as ${name} on this machine, and say /register PASSWORD.`,
      ),
    );
    const alice = await enter(server, LOGIN);
    expect(await answersTo(alice, "/bans")).toEqual(["* Nobody is banned."]);
  });

  test("does what is typed at the terminal, and goes on after Ctrl+D", async () => {
    const server = inTerminal(COMMAND);
    const [, port] = await server.out.until(/running on 127\.0\.0\.1:(\d+), waiting/);
    await server.prints("/who\n", "* 0 people are here:");
    const peers = await enterAll({ port: Number(port) }, "alice", "bob", "carol");
    const [alice, bob, carol] = peers;
    await server.prints("/say hello\n/who\n", `* 3 people are here: alice, bob, carol`);
    await alice.until("* The server says: hello");
    await server.prints("/kick carol\n", "carol from clients (kicked by the server)");
    await carol.until("* You were kicked by the server");

    server.type("\x04");
    await stillServes({ port: Number(port) }, alice, bob);
    for (const peer of peers) peer.socket.terminate();
    server.child.kill("SIGTERM");
    await server.ends(0, "Server is shutting down");
  });

  const ORDERS = `${folder}/orders`;
  test.each(["/dev/null", ORDERS, `<(cat ${ORDERS})`])(
    "does nothing that comes from elsewhere: %s",
    async (input) => {
      await Bun.write(ORDERS, "/say hello\n/kick alice\n/ban bob\n");
      const script = `exec "$0" server.ts --port 0 < ${input}`;
      const server = await serveBy(["bash", "-c", script, process.execPath]);
      const [alice, bob] = await enterAll(server, "alice", "bob");
      await stillServes(server, alice, bob);
      const heard = ["* latecomer has joined the chat", "* latecomer has left the chat"];
      expect(await alice.ping()).toEqual(heard);
      for (const peer of [alice, bob]) peer.socket.terminate();
      server.child.kill("SIGTERM");
      const { code, out } = await server.result();
      expect(code).toBe(0);
      expect(out).not.toMatch(/The server says|Nobody here/);
    },
  );

  test("leaves the terminal to a shell that has started it in the background, until fg", async () => {
    const shell = inTerminal(["bash", "--norc", "-i"], { env: { PS1: "$ " } });
    shell.type(`${COMMAND.join(" ")} &\n`);
    const [, pid] = await shell.out.until(/\[1\] (\d+)/);
    cleanups.push(() => Bun.spawnSync(["kill", "-9", `${pid}`])); // if it is still there
    const [, port] = await shell.out.until(/running on 127\.0\.0\.1:(\d+), waiting/);
    await shell.prints("/say-hello\n", "/say-hello: No such file");
    await shell.prints("jobs\n", /\[1\]\+ +Running /);
    const [alice, bob] = await enterAll({ port: Number(port) }, "alice", "bob");

    shell.type("fg\n/say hello\n");
    for (const peer of [alice, bob]) expect(await peer.line()).toBe("* The server says: hello");

    await shell.prints("\x1a", /\[1\]\+ +Stopped /);
    await shell.prints("bg\n", /\[1\]\+ /);
    await stillServes({ port: Number(port) }, alice, bob); // it has seen that it goes on
    await shell.prints("/say-more\n", "/say-more: No such file");
    await shell.prints("jobs\n", /\[1\]\+ +Running /);
    expect(await alice.ping()).toHaveLength(2); // arrivals
    for (const peer of [alice, bob]) peer.socket.terminate();
    await shell.prints("kill %1; wait\n", "Server is shutting down");
  });
});

// --- 18. Browsers ------------------------------------------------------------------------------
// What is the same for a WebSocket stands in the sections before.

/** Sends an HTTP request as it is written. Resolves with the answer, up to the end of the connection. */
async function ask(port: number, lines: readonly string[]): Promise<string> {
  const peer = await Peer.connect({ port });
  peer.send([...lines, "Connection: close", "", ""].join("\r\n"));
  return (await peer.rest()).join("\n");
}

/** Asks for a WebSocket. Resolves with the first line of the answer. */
async function askForRoom(server: Address, headers: readonly string[]): Promise<string> {
  const peer = await Peer.connect({ ...server, isWeb: false });
  const request = ["GET /room HTTP/1.1", ...headers, ...UPGRADE, "", ""];
  peer.send(request.join("\r\n"));
  return (await peer.line()).trimEnd();
}

const SWITCHING = "HTTP/1.1 101 Switching Protocols";
const FORBIDDEN = "HTTP/1.1 403 Forbidden";

describe("the page", () => {
  test("may run its own script, use its own style, and do nothing else", async () => {
    const { webPort } = open({ web: 0 });
    const response = await fetch(`http://127.0.0.1:${webPort}/`);
    const html = await response.text();
    expect(html).toBe(await Bun.file(`${import.meta.dir}/client.html`).text());

    const hashOf = (tag: string) => {
      const code = html.slice(
        html.indexOf(">", html.indexOf(`<${tag}`)) + 1,
        html.indexOf(`</${tag}>`),
      );
      return `'sha256-${new Bun.CryptoHasher("sha256").update(code).digest("base64")}'`;
    };
    expect(response.headers.get("content-security-policy")?.split("; ")).toEqual([
      "default-src 'none'",
      `script-src ${hashOf("script")}`,
      `style-src ${hashOf("style")}`,
      "img-src data:",
      "connect-src 'self'",
      "frame-ancestors 'none'",
      "base-uri 'none'",
      "form-action 'none'",
      "require-trusted-types-for 'script'",
      "trusted-types 'none'",
    ]);
    expect(Object.fromEntries(response.headers)).toMatchObject({
      "content-type": "text/html; charset=utf-8",
      "cross-origin-opener-policy": "same-origin",
      "referrer-policy": "no-referrer",
      "x-content-type-options": "nosniff",
    });
  });

  test.each([
    ["GET /nothing", [], "404"],
    ["GET /../server.ts", [], "404"],
    ["GET /%2e%2e/server.ts", [], "404"],
    ["GET /room", [], "426"],
    ["GET /", ["Host: evil.example"], "403"],
    ["GET /", ["Host: a b"], "403"],
    ["GET /", ["Host: 127.0.0.1:99999"], "404"],
    ["PUT /", [], "405"],
    ["POST /", ["Content-Length: 3", "", "abc"], "413"],
    ["GET /", [`X: ${"x".repeat(20_000)}`], "431"],
    ["HEAD /", [], "200"],
  ])("is all there is: %s", async (request, more, status) => {
    const { webPort = NaN } = open({ web: 0 }); // which would fail the test if it logged an error
    const host = more.some((line) => line.startsWith("Host:"))
      ? []
      : [`Host: 127.0.0.1:${webPort}`];
    const answer = await ask(webPort, [`${request} HTTP/1.1`, ...host, ...more]);
    expect(answer).toStartWith(`HTTP/1.1 ${status} `);
    expect(answer).not.toMatch(/\bat \S+:\d+|Bun|server\.ts/);
  });

  test("comes once on a connection, which nobody can keep busy", async () => {
    const { webPort = NaN } = open({ web: 0 });
    for (const path of ["/", "/nothing", "/metrics", "/room"]) {
      const request = `GET ${path} HTTP/1.1\r\nHost: 127.0.0.1:${webPort}\r\n\r\n`;
      const peer = await Peer.connect({ port: webPort });
      peer.send(request.repeat(100));
      const answers = (await peer.rest()).filter((line) => line.startsWith("HTTP/1.1 "));
      expect(answers).toHaveLength(1);
    }
  });

  test("is not there without --web", async () => {
    expect(open().webPort).toBeUndefined();
  });
});

describe("an origin", () => {
  const OURS = "https://chat.example.org";

  // Host, Origin, and whether a page of that origin may enter, by what the server was started with.
  const ORIGINS = `
    127.0.0.1:PORT http://127.0.0.1:PORT yes; localhost:PORT http://localhost:PORT yes;
    [::1]:PORT http://[::1]:PORT yes; 127.0.0.1:PORT none yes; 192.0.2.1:9 http://192.0.2.1:9 yes;
    127.0.0.1:PORT http://evil.example no; 127.0.0.1:PORT http://localhost:PORT no;
    127.0.0.1:PORT http://127.0.0.1:1 no; 127.0.0.1:PORT https://127.0.0.1:PORT no;
    127.0.0.1:PORT null no; evil.example:PORT http://evil.example:PORT no; evil.example none no;
    localhost.evil.example http://localhost.evil.example no; 1.2.3.4.evil.example none no;
    chat.example.org https://chat.example.org no; 127.0.0.1:PORT https://chat.example.org no`;

  const NAMED = `
    chat.example.org https://chat.example.org yes; 127.0.0.1:PORT https://chat.example.org yes;
    127.0.0.1:PORT http://127.0.0.1:PORT yes; chat.example.org none yes;
    chat.example.org http://chat.example.org no; chat.example.org https://evil.example no;
    evil.example https://chat.example.org no; evil.example none no`;

  const UNDER_TLS = `
    chat.lan:PORT https://chat.lan:PORT yes; 127.0.0.1:PORT https://127.0.0.1:PORT yes;
    chat.lan:PORT none yes; chat.lan:PORT http://chat.lan:PORT no;
    chat.lan:PORT https://evil.example no`;

  async function expectEntry(room: Server, row: string) {
    const at = (text: string) => text.replaceAll("PORT", `${room.port}`);
    const [host = "", origin = "", answer = ""] = row.split(" ");
    const headers = [`Host: ${at(host)}`, ...(origin === "none" ? [] : [`Origin: ${at(origin)}`])];
    expect(await askForRoom(room, headers)).toBe(answer === "yes" ? SWITCHING : FORBIDDEN);
  }

  test.each(rowsOf(ORIGINS))("must be an address of ours: %s", async (row) => {
    await expectEntry(openForBrowsers(), row);
  });

  test.each(rowsOf(NAMED))("may be the one that is named: %s", async (row) => {
    await expectEntry(openForBrowsers({ webOrigin: OURS }), row);
  });

  test.each(rowsOf(UNDER_TLS))("may be any name that our certificate proves: %s", async (row) => {
    await expectEntry(openTlsForBrowsers(), row);
  });
});

describe("behind a proxy", () => {
  const FROM = "X-Forwarded-For: 10.9.9.9, 198.51.100.7";

  /** Enters through a proxy on this machine. */
  async function enterThrough(room: Server, login: string, headers: readonly string[]) {
    const peer = await Peer.connect(room, headers);
    peer.name = login;
    peer.send(`${login}\n`);
    return peer;
  }

  test("each address has 64 places, also where the proxy is on the machine of the server", async () => {
    const room = openForBrowsers({ webOrigin: "https://chat.example.org" });
    const crowd = await Promise.all(times(70, () => Peer.connect(room, [FROM])));
    const first = await Promise.all(crowd.map((peer) => peer.line()));
    expect(first.filter((line) => line === TOO_MANY)).toHaveLength(6);
  });

  test("each address has its own places, the last one in the list", async () => {
    const webOrigin = "https://chat.example.org";
    const { room, log } = openLogged({ maxPerAddress: 1, webOrigin }, openForBrowsers);
    const alice = await enterThrough(room, "alice", [FROM]);
    expect(await alice.lines(2)).toEqual([WELCOME, "* The room contains: "]);
    expect(log).toContain("User alice has joined the chat. From 198.51.100.7:PORT");

    const second = await Peer.connect(room, ["X-Forwarded-For: 198.51.100.7"]);
    expect(await second.line()).toBe(TOO_MANY);
    const other = await Peer.connect(room, ["X-Forwarded-For: 198.51.100.7, 2001:db8::1"]);
    expect(await other.line()).toBe(WELCOME);
  });

  test("an address that it names is not believed without --web-origin, but is not this machine", async () => {
    const { room, log } = openLogged({ operators: ["oscar"], db: newFile() }, openForBrowsers);
    const alice = await enterThrough(room, "alice", [FROM]);
    expect(await alice.lines(2)).toEqual([WELCOME, "* The room contains: "]);
    expect(log).toContain("User alice has joined the chat. From 127.0.0.1:PORT");
    expect(await answersTo(alice, "/register password")).toEqual([
      expect.stringContaining("Passwords are taken only under TLS"),
    ]);
    expect(await answersTo(alice, "/nick oscar")).toEqual([
      expect.stringContaining("is kept for an operator"),
    ]);
  });

  test("an address is the same however it is written", async () => {
    const webOrigin = "https://chat.example.org";
    const room = openForBrowsers({ maxPerAddress: 1, webOrigin });
    const heard: string[] = [];
    for (const address of ["2001:db8::5", "2001:0DB8:0:0::5", "198.51.100.7", "::ffff:c633:6407"])
      heard.push(await (await Peer.connect(room, [`X-Forwarded-For: ${address}`])).line());
    expect(heard).toEqual([WELCOME, TOO_MANY, WELCOME, TOO_MANY]);
  });

  test("the address of the machine itself is not banned", async () => {
    const room = openForBrowsers();
    await enterThrough(room, "alice", [FROM]).then((peer) => peer.lines(2));
    room.command("/ban alice");
    expect(room.command("/bans")).toBe("* alice is banned for another 60 minutes");
    await enter(room, "bob");
  });

  test.each(["10.9.9.9, nonsense", "", "unknown"])("an address must be one: %j", async (list) => {
    const webOrigin = "https://chat.example.org";
    const { room, log } = openLogged({ webOrigin }, openForBrowsers);
    await enterThrough(room, "alice", [`X-Forwarded-For: ${list}`]).then((peer) => peer.lines(2));
    expect(log).toContain("User alice has joined the chat. From 127.0.0.1:PORT");
  });

  test.each([
    ["https://chat.example.org", true],
    ["http://chat.example.org", false],
  ])("passwords are taken where browsers come by %s: %p", async (webOrigin, isTaken) => {
    const room = openForBrowsers({ webOrigin, db: newFile() });
    const alice = await enterThrough(room, "alice", [FROM]);
    await alice.lines(2);
    const [answer] = await answersTo(alice, "/register password");
    expect(answer?.includes("only under TLS")).toBe(!isTaken);
  });
});

describe("a WebSocket", () => {
  test("is in one room with those who come by TCP", async () => {
    const tcp = open({ web: 0 });
    const web = webOf(tcp);
    const alice = await enter(web, "alice");
    const bob = await enter(tcp, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    bob.send("/msg alice psst\nhi\n");
    expect(await alice.lines(2)).toEqual(["[bob -> alice] psst", "[bob] hi"]);
    expect(await bob.line()).toBe("[bob -> alice] psst");
    alice.send("/quit\n");
    expect(await alice.rest()).toEqual([]);
    expect(await bob.line()).toBe("* alice has left the chat");
  });

  test("sees the same as those who come by TCP, however long and in whatever script", async () => {
    const tcp = open({ web: 0 });
    const web = webOf(tcp);
    const crowd = await enterTogether(
      tcp,
      times(200, (number) => "語".repeat(28) + (number + 100)),
    );
    const [reader, ...browsers] = await Promise.all([
      enter(tcp, "reader"),
      ...called("browser", 5).map((name) => enter(web, name)),
    ]);
    for (const peer of [reader, ...browsers]) await peer.ping();
    for (const [number, peer] of crowd.entries())
      peer.send(`${number} ${"😀é語x".repeat(number)}\n/who\n`);

    // The rosters of those who come by WebSocket are longer than a frame.
    for (const peer of browsers) peer.send("/who\n");
    const expected = await reader.lines(200);
    for (const peer of browsers) {
      const heard = await peer.lines(201);
      expect(heard.filter((line) => line.startsWith("["))).toEqual(expected);
      expect(heard.find((line) => line.startsWith("* 206 people are here: "))?.length).toBe(
        present(...namesIn(tcp)).length,
      );
    }
  });

  test("may cut up its lines into frames as it likes, but the end of a frame ends a line", async () => {
    const [alice, bob] = await enterAll(openForBrowsers(), "alice", "bob");
    const frames = [
      encodeFrame(TEXT, "one\ntwo\nthree"),
      encodeFrame(2, "binary\n"),
      encodeFrame(TEXT, ""),
      encodeFrame(TEXT, "fo", { head: 0 }),
      encodeFrame(PING, "are you there?"),
      encodeFrame(0, "ur\n"),
      encodeFrame(TEXT, `${"x".repeat(4096)}\n${"y".repeat(4097)}\nend`),
    ];
    alice.sendRaw(Buffer.concat(frames));
    const lines = ["one", "two", "three", "binary", "four", "x".repeat(4096), "end"];
    expect(await bob.lines(7)).toEqual(lines.map((line) => `[alice] ${line}`));
    expect(await alice.line()).toBe(TOO_LONG);
  });

  const HUGE = "x".repeat(16 * 1024 + 1);
  const BAD_FRAMES: [string, Buffer[], number][] = [
    ["without a mask", [encodeFrame(TEXT, "hi\n", { mask: 0 })], 1002],
    ["with a reserved opcode", [encodeFrame(3, "hi\n")], 1002],
    ["with a reserved bit", [encodeFrame(TEXT, "hi\n", { head: FIN | 0x40 })], 1002],
    ["that continues nothing", [encodeFrame(0, "hi\n")], 1002],
    [
      "within another message",
      [encodeFrame(TEXT, "hi\n", { head: 0 }), encodeFrame(TEXT, "hi\n")],
      1002,
    ],
    ["that is too long", [encodeFrame(TEXT, HUGE)], 1009],
    [
      "that is too long with those before it",
      times(3, (number) => encodeFrame(number === 0 ? TEXT : 0, HUGE.slice(0, 8000), { head: 0 })),
      1009,
    ],
    ["that is not UTF-8", [encodeFrame(TEXT, Buffer.from([0x68, 0xff, 0x0a]))], 1007],
    ["that is a long ping", [encodeFrame(PING, "x".repeat(126))], 1002],
    ["that is a ping in parts", [encodeFrame(PING, "x", { head: 0 })], 1002],
    ["that closes with a bad code", [encodeFrame(CLOSE, Buffer.from([0, 1]))], 1002],
  ];
  test.each(BAD_FRAMES)(
    "with a frame %s ends, and nobody else notices",
    async (_, frames, code) => {
      const [room, alice, bob] = await gather(openForBrowsers(), "alice", "bob");
      const mallory = await enter(room, "mallory");
      mallory.sendRaw(Buffer.concat([encodeFrame(TEXT, "before\n"), ...frames]));
      mallory.send("behind\n");
      await mallory.ended.promise;
      if (mallory.closeCode > 0) expect(mallory.closeCode).toBe(code);
      const heard = (await bob.until(/^\* mallory has left/)).filter((line) =>
        line.startsWith("["),
      );
      expect(heard).not.toContain("[mallory] behind");
      await stillServes(room, alice, bob);
    },
  );

  test.each([
    ["empty frames", encodeFrame(TEXT, "")],
    ["pings", encodeFrame(PING, "")],
    ["pongs", encodeFrame(PONG, "")],
  ])("that sends nothing but %s is held back", async (_, frame) => {
    jest.useFakeTimers();
    const [alice, bob] = await enterAll(openForBrowsers({ rate: 10 }), "alice", "bob");
    alice.sendRaw(Buffer.concat(times(2000, () => frame)));
    await turns(50);
    alice.send("hello\n");
    expect(await bob.ping()).toEqual([]);
    await pass(200);
    expect(await bob.line()).toBe("[alice] hello");
  });

  test("that sends pings without end is cut off where nothing should come", async () => {
    jest.useFakeTimers();
    const room = openForBrowsers({ rate: 10, maxPerAddress: 64 });
    const crowd = await Promise.all(times(21, () => Peer.connect(room)));
    const waiting = crowd.at(-1);
    if (!waiting) throw new Error("nobody waits");
    waiting.sendRaw(Buffer.concat(times(50_000, () => encodeFrame(PING, ""))));
    await waiting.ended.promise;
    expect(crowd.filter(({ isOpen }) => isOpen)).toHaveLength(20);
  });

  test("with thousands of tiny frames is read as one text", async () => {
    const [alice, bob] = await enterAll(openForBrowsers(), "alice", "bob");
    alice.sendRaw(Buffer.concat(times(20_000, (number) => encodeFrame(TEXT, `${number}`))));
    expect(await bob.lines(20_000)).toEqual(times(20_000, (number) => `[alice] ${number}`));
  });

  test.each(["reads the answers", "does not read"])(
    "that sends pings without end and %s is held back, and does not fill the memory",
    async (how) => {
      const server = await serve("--web", "0");
      const web = await webOfProgram(server);
      const [alice, bob] = await enterAll(web, "alice", "bob");
      const before = memory(server.pid, "VmRSS");
      const pings = Buffer.concat(times(1000, () => encodeFrame(PING, "x".repeat(125))));
      if (how === "does not read") bob.socket.pause();
      let sent = 0;
      for (let turn = 0; turn < 400; turn++) {
        sent += Math.max(0, bob.socket.write(pings));
        await turns(1);
      }
      expect(sent).toBeLessThan(10 * MIB);
      expect(memory(server.pid, "VmRSS") - before).toBeLessThan(30 * 1024);
      await enter(web, "carol");
      await alice.until("* carol has joined the chat");
    },
  );

  test.each(["in good order", "without a word"])("that ends %s has left", async (how) => {
    const [alice, bob] = await enterAll(openForBrowsers(), "alice", "bob");
    alice.send("one\n");
    expect(await bob.line()).toBe("[alice] one");
    if (how === "in good order") alice.finish();
    else alice.socket.terminate();
    expect(await bob.line()).toBe("* alice has left the chat");
  });

  test("that closes is heard to its last line, though it is ahead of its rate", async () => {
    jest.useFakeTimers();
    const room = openForBrowsers({ rate: 10, maxClients: 2 });
    const [alice, bob] = await enterAll(room, "alice", "bob");
    alice.send(toText(numbered(120)));
    alice.finish();
    expect(await bob.lines(NEWCOMER_LINES)).toEqual(numbered(NEWCOMER_LINES, "alice"));
    expect(await bob.ping()).toEqual([]);
    await pass(11);
    const rest = numbered(120, "alice").slice(NEWCOMER_LINES);
    expect(await bob.lines(rest.length + 1)).toEqual([...rest, "* alice has left the chat"]);
    await enter(room, "carol"); // there is a place again
    expect(room.memoryUsed).toBe(0);
  });

  test("that follows hears marks, and others do not", async () => {
    const room = openForBrowsers();
    const { peer: alice } = await follow(room, "alice");
    await linesUntil(alice, "* alice has joined the chat");
    const bob = await enter(room, "bob");
    await linesUntil(alice, "* bob has joined the chat");
    bob.send("one\n");
    await linesUntil(alice, "[bob] one");
    alice.send("two\n");
    expect(await bob.line()).toBe("[alice] two");
    expect(await bob.ping()).toEqual([]);
  });

  test("that is shown out while it floods still reads why", async () => {
    const room = openForBrowsers({ db: newFile() });
    const [alice, bob] = await enterAll(room, "alice", "bob");
    alice.send(toText(numbered(50_000)));
    await bob.lines(100);
    room.command("/kick alice spam");
    const last = (await alice.rest()).at(-1);
    expect(last).toBe("* You were kicked by the server: spam");
    expect(alice.closeCode).toBe(1000);
  });

  test("stays in the room while the certificate is renewed, and the port is still open", async () => {
    const room = openTlsForBrowsers();
    const [alice, bob] = await enterAll(room, "alice", "bob");
    for (let time = 0; time < 3; time++) room.renewCertificate();
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    await enter(room, "carol");
    expect(await bob.line()).toBe("* carol has joined the chat");
  });

  test("leaves its port free at once when the server stops", async () => {
    const room = openForBrowsers();
    const alice = await enter(room, "alice");
    const stopped = room.stop();
    expect(await alice.rest()).toEqual([SHUTDOWN]);
    await stopped;
    await enter(openForBrowsers({ web: room.port }), "alice");
  });
});

describe("compiled programs", () => {
  test("are one for each of the two, which has all that it needs", async () => {
    const programs = fs.mkdtempSync(`${tmpdir()}/bun-chat-programs-`);
    cleanups.push(() => fs.rmSync(programs, { recursive: true }));
    const build = async (...options: string[]) => {
      const command = [process.execPath, "build", "--compile", ...options];
      expect(await inPipe(command).result()).toMatchObject({ code: 0 });
    };
    await build("--asset", "client.html", "server.ts", "--outfile", `${programs}/bun-chat-server`);
    await build("client.ts", "--outfile", `${programs}/bun-chat`);

    const server = await serveBy([`${programs}/bun-chat-server`, "--port", "0", "--web", "0"]);
    const { port } = await webOfProgram(server);
    const page = await fetch(`http://127.0.0.1:${port}/`);
    expect(await page.text()).toBe(await Bun.file(`${import.meta.dir}/client.html`).text());

    const client = inPipe([`${programs}/bun-chat`, "--port", `${server.port}`, "--name", "alice"]);
    client.type("hello\n");
    await server.out.until("Received message from alice: hello");
    client.child.kill();
  });
});

describe("when descriptors run short", () => {
  test.each(["", "GET / HTTP/1.1\r\nHo"])(
    "connections that ask for nothing (%j) keep nobody out, and cost no time",
    async (beginning) => {
      const command = `ulimit -n 256; exec ${process.execPath} server.ts --port 0 --web 0`;
      const server = await serveBy(["bash", "-c", command]);
      const web = await webOfProgram(server);
      const [alice, bob] = await enterAll(web, "alice", "bob");

      const idle = await Promise.all(
        times(400, async () => {
          const peer = await Peer.connect({ port: web.port });
          peer.send(beginning);
          return peer;
        }),
      );
      alice.send("hello\n");
      expect(await bob.line()).toBe("[alice] hello");
      await enter(server, "carol");
      expect(await bob.line()).toBe("* carol has joined the chat");
      await enter(web, "dave");
      expect(await bob.line()).toBe("* dave has joined the chat");
      if (beginning !== "") expect(idle.some(({ isOpen }) => !isOpen)).toBe(true);
    },
    8_000, // ms; after ten seconds Bun ends them by itself
  );

  test("connections from the port of somebody in the room are ended, if they are somebody else's", async () => {
    const command = `ulimit -n 256; exec ${process.execPath} server.ts --port 0 --web 0`;
    const server = await serveBy(["bash", "-c", command]);
    const web = await webOfProgram(server);
    const [alice, bob] = await enterAll(web, "alice", "bob");
    const { localPort } = alice.socket;
    const idle = times(250, async (number) => {
      const from = { localAddress: `127.0.1.${number + 1}`, localPort };
      const socket = createConnection({ host: "127.0.0.1", port: web.port, ...from });
      cleanups.push(() => socket.destroy());
      socket.on("error", () => {}); // it is reset, or the server is gone
      await once(socket, "connect");
      socket.write("GET / HTTP/1.1\r\n");
    });
    await Promise.all(idle);

    await enter(server, "carol");
    for (const peer of [alice, bob]) expect(await peer.line()).toBe("* carol has joined the chat");
  }, 8_000);
});

describe("the metrics", () => {
  test("never fall, whoever leaves with words of its own", async () => {
    const room = open({ web: 0 });
    const alice = await greeted(room);
    alice.send(`alice\n${"hi\n".repeat(15)}/quit\n`);
    await alice.rest();
    const bob = await enter(room, "bob");
    bob.send("/help\n");
    const help = await bob.ping();
    const { numbers } = await metricsOf(room.webPort);
    // Two greetings; alice hears that she comes and goes; bob that he comes, the help, and a mistake.
    expect(numbers["lines_out_total"]).toBe(2 + 2 + 1 + help.length + 1);
  });

  async function metricsOf(port: number | undefined, headers = {}) {
    const response = await fetch(`http://127.0.0.1:${port}/metrics`, { headers });
    const text = await response.text();
    const values = text.matchAll(/^bunchat_(\S+) (\S+)$/gm);
    const numbers = Object.fromEntries(
      Array.from(values, ([, name, value]) => [name, Number(value)]),
    );
    return { response, text, numbers };
  }

  test("count what happens", async () => {
    const room = open({ web: 0, rate: 10 });
    const [alice, bob] = await enterAll(room, "alice", "bob");
    const refused = toText([WELCOME, ...(await refusalOf(room, "alice"))]);
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    alice.send(toText(numbered(200)));
    await bob.lines(10);

    const { response, text, numbers } = await metricsOf(room.webPort);
    expect(response.headers.get("content-type")).toStartWith("text/plain; version=0.0.4");
    expect(numbers).toMatchObject({
      people: 2,
      held_back_senders: 1,
      bytes_in_total: "alice\nbob\nalice\nhello\n".length + toText(numbered(200)).length,
      bytes_out_total: alice.total + bob.total + refused.length,
      'refusals_total{reason="taken"}': 1,
      'refusals_total{reason="other"}': 0,
      slow_readers_total: 0,
      database_errors_total: 0,
    });
    const { lines_in_total: linesIn = NaN, flush_lines_sum: said = NaN } = numbers;
    expect(linesIn).toBeWithin(13, 30); // names, and what came before alice was held back
    expect(said).toBe(linesIn - 3 + 2); // less three names, and two have joined
    expect(numbers['flush_lines_bucket{le="+Inf"}']).toBe(numbers["flush_lines_count"] ?? NaN);
    for (const line of text.trimEnd().split("\n"))
      expect(line).toMatch(
        /^(# (HELP|TYPE) bunchat_\w+ .+|bunchat_\w+(\{\w+="[^"]+"\})? [\d.e-]+)$/,
      );
  });

  test("count those who are refused, by the reason", async () => {
    jest.useFakeTimers();
    const room = open({ web: 0, db: withAlice(), maxClients: 4, maxPerAddress: 3 });
    await enter(room, "bob");
    for (const name of [
      "bob",
      "b0b",
      "alice",
      "alice wrong",
      "carol secret",
      "",
      "x y z",
      "Ω\u0301b",
    ])
      await refusalOf(room, name);
    await enter(room, "mallory");
    room.command("/ban mallory");
    await refusalOf(room, "mallory");
    await greeted(room);
    jest.advanceTimersByTime(61_000);
    const peers = await Promise.all(times(3, () => Peer.connect(room)));
    await Promise.all(peers.map((peer) => peer.line()));

    expect(await refusalsIn(room)).toEqual(
      "full 0, address 2, banned 1, tls 0, deadline 1, registered 4, taken 2, name 2, other 0",
    );

    const full = open({ web: 0, maxClients: 1 });
    await enterAll(full, "alice");
    expect(await (await Peer.connect(full)).rest()).toEqual([FULL]);
    expect(await refusalsIn(full)).toStartWith("full 1, address 0, ");
  });

  async function refusalsIn({ webPort }: Server): Promise<string> {
    const { numbers } = await metricsOf(webPort);
    const refusals = Object.entries(numbers).filter(([name]) => name.startsWith("refusals"));
    return refusals.map(([name, count]) => `${/"(\w+)"/.exec(name)?.[1]} ${count}`).join(", ");
  }

  test("count slow readers", async () => {
    jest.useFakeTimers();
    const [room, alice, carol] = await gather(open({ web: 0 }), "alice", "carol");
    await lagBehind(room, alice, carol, 3_000_000);
    jest.advanceTimersByTime(12_000);
    await alice.until("* carol has left the chat (too slow)");
    const { numbers } = await metricsOf(room.webPort);
    expect(numbers).toMatchObject({ people: 1, slow_readers_total: 1 });
  });

  test.each([
    ["from this machine", {}, 200],
    ["through a proxy", { "x-forwarded-for": "198.51.100.7" }, 403],
    ["by a name that leads here", { host: "evil.example" }, 403],
  ])("are for programs of this machine: %s", async (_, headers, status) => {
    const { response } = await metricsOf(open({ web: 0 }).webPort, headers);
    expect(response.status).toBe(status);
  });

  test.each([
    ["the token", { authorization: "Bearer s3cret" }, 200],
    [
      "the token through a proxy",
      { authorization: "Bearer s3cret", "x-forwarded-for": "1.2.3.4" },
      200,
    ],
    ["a wrong token", { authorization: "Bearer s3cre" }, 401],
    ["no token", {}, 401],
  ])("are for those with the token, if there is one: %s", async (_, headers, status) => {
    const { response } = await metricsOf(open({ web: 0, metricsToken: "s3cret" }).webPort, headers);
    expect(response.status).toBe(status);
  });
});

// --- 19. The page in a browser -----------------------------------------------------------------
// What only a browser can break. Each test has a tab of its own, all of them in one browser, which
// starts with the first.

if (!hasBrowser && !process.env["CI"])
  console.warn("Tests of the page are skipped: there is no Chromium (apt install chromium).");

describe("the door of the page", () => {
  testInBrowser("lets in by a name, which it remembers, and says who is here", async () => {
    const room = open({ web: 0 });
    const bob = await enter(room, "bob");
    const page = await openPage(room);
    await page.enter("alice");
    await page.lists("bob", "alice (you)");
    expect(await page.focus()).toBe("text");
    expect(await bob.line()).toBe("* alice has joined the chat");

    await page.reload();
    expect(await bob.line()).toBe("* alice has left the chat");
    expect(await page.value("name")).toBe("alice");
    await page.press("Enter");
    await page.arrives("alice");
  });

  testInBrowser("says why a name is refused, and takes another one", async () => {
    const room = open({ web: 0 });
    const bob = await enter(room, "bob");
    const page = await openPage(room);
    for (const [name, refusal] of [
      ["b o b", NAME_RULE],
      ["b-o-b", NAME_RULE],
      ["Bob", "* The name Bob is taken."],
    ] as const) {
      await page.fill("name", name);
      await page.press("Enter");
      await page.has("refusal", refusal.slice(2));
      expect(await page.focus()).toBe("name");
    }
    expect(await page.evaluate(`$("refusal").role`)).toBe("alert");
    expect(await page.evaluate(`$("room").checkVisibility()`)).toBe(false);
    await page.fill("name", "alice");
    await page.click("enter");
    await page.arrives("alice");
    expect(await bob.line()).toBe("* alice has joined the chat");
  });

  testInBrowser("says that there is no server, and tries once more when asked to", async () => {
    const room = open({ web: 0 });
    const page = await openPage(room);
    await room.stop();
    await page.fill("name", "alice");
    await page.press("Enter");
    await page.has("refusal", "The room cannot be reached.");
    open({ web: room.webPort });
    await page.press("Enter");
    await page.arrives("alice");
  });

  testInBrowser(
    "is where one comes after leaving, when all that was said has arrived",
    async () => {
      const room = open({ web: 0 });
      const bob = await enter(room, "bob");
      const page = await enterByPage(room, "alice");
      const lines = JSON.stringify(numbered(1500)); // more than are sent at once
      await page.run(`
        $("text").value = ${lines}.join("\\n"); // to type them takes the browser many seconds
        $("text").dispatchEvent(new Event("input"))`);
      await page.press("Enter");
      await page.click("leave");
      await page.until(`$("door").checkVisibility() && !$("room").checkVisibility()`);
      const expected = ["* alice has joined the chat", ...numbered(1500, "alice")];
      expect(await bob.lines(1502)).toEqual([...expected, "* alice has left the chat"]);
      expect(await page.evaluate(`$("refusal").textContent`)).toBe("");

      await page.enter("anna");
      await page.lists("bob", "anna (you)");
      await page.say("/quit");
      await page.until(`$("door").checkVisibility()`);
    },
  );
});

describe("the conversation in the page", () => {
  testInBrowser("is the same for a browser, a terminal and a bare socket", async () => {
    const room = open({ web: 0 });
    const [bob, dave] = await enterAll(room, "bob", "dave");
    const page = await enterByPage(room, "alice");
    const carol = inTerminal(client(room.port, "--name", "carol"));
    await carol.out.until("You: ");
    await dave.until("* carol has joined the chat");
    for (const line of numbered(5)) {
      bob.send(`${line}\n`);
      carol.type(`${line}\r`);
      await page.say(line);
    }

    const order = await dave.lines(15);
    for (const name of ["alice", "bob", "carol"])
      expect(order.filter((line) => line.startsWith(`[${name}]`))).toEqual(numbered(5, name));
    await page.until(`rowsOf("lines").filter(({ name }) => name).length === 15`);
    expect(await page.said()).toEqual(order);
    const others = order.filter((line) => !line.startsWith("[carol]"));
    await carol.out.until(others.at(-1) ?? "");
    const lines = carol.picture().text.split("\n");
    expect(lines.filter((line) => line.startsWith("["))).toEqual(others);
  });

  testInBrowser("shows what people say as it is, and does nothing of it", async () => {
    const room = open({ web: 0 });
    const [mallory, hebrew] = await enterAll(room, "mallory", "אבג");
    const page = await enterByPage(room, "alice", { width: 390, height: 844 });
    const lines = [
      `<img src=x onerror="document.title = 'broken'">`,
      "<script>document.title = 'broken'</script><b>bold</b> &lt; &amp; <!--",
      `"><svg onload=alert(1)> javascript:document.title='broken' data:text/html,x ftp://x/`,
      "a".repeat(4096),
      "語".repeat(300),
      "שלום (עולם) abc 123 !",
      `z${"\u0301".repeat(40)}`,
      "tab\there, two  blanks",
      "\u{1f468}\u200d\u{1f469}\u200d\u{1f467}".repeat(40),
    ];
    mallory.send(toText(lines));
    mallory.send("\u001b[31mred\u0007 a\u202eb\u2066c\u200f\n");
    hebrew.send("שלום\n");
    await page.sees("[אבג] שלום");
    const cleaned = lines.map((line) => line.replace(/\u0301{5,}/, "\u0301".repeat(4)));
    const said = [...cleaned, "[31mred abc"].map((line) => `[mallory] ${line}`);
    expect(await page.said()).toEqual([...said, "[אבג] שלום"]);
    const directions = await page.evaluate(`
      [$("lines").lastElementChild, $("lines").lastElementChild.querySelector(".words")]
        .map((element) => getComputedStyle(element).direction)`);
    expect(directions).toEqual(["ltr", "rtl"]); // the text has its own, and the row keeps its
    expect(await page.evaluate("document.title")).toBe("bun-chat");
    expect(await page.evaluate("[document.images.length, document.links.length]")).toEqual([0, 0]);
    expect(await page.evaluate(`$("lines").querySelectorAll("script, svg, b").length`)).toBe(0);
    expect(await page.isTooWide()).toBe(false);
  });

  testInBrowser("makes links of web addresses, and of nothing else", async () => {
    const { bob, page } = await meetInPage();
    // What is said, and the links in it.
    const links: [string, string[]][] = [
      ["see https://a.example/x?y=1&z=%20#end.", ["https://a.example/x?y=1&z=%20#end"]],
      ["(http://b.example), HTTPS://C.example/!", ["http://b.example", "HTTPS://C.example/"]],
      [`https://d.example"onclick=alert(1)`, ["https://d.example"]],
      ["https://e.example<script>", ["https://e.example"]],
      ["javascript:alert(1) data:text/html,x ftp://x.example file:///etc //x.example", []],
      ["https:// http://: https://[ javascript://x%0aalert(1)", []],
      [
        "https://f.example:81/a_b/~c https://a.example/(b)",
        ["https://f.example:81/a_b/~c", "https://a.example/(b)"],
      ],
      ["https://bank.example@evil.example/ https://a:b@evil.example", []], // where do they lead?
    ];
    bob.send(toText(links.map(([line]) => line)));
    for (const [line] of links) await page.sees(`[bob] ${line}`);
    expect(
      await page.evaluate(`Array.from($("lines").querySelectorAll("li:has(.name)"), (row) =>
        Array.from(row.querySelectorAll("a"), (link) => link.textContent))`),
    ).toEqual(links.map(([, texts]) => texts));
    const all = await page.evaluate<{ target: string; rel: string; leads: boolean }[]>(`
      Array.from(document.links, ({ target, rel, href, textContent }) =>
        ({ target, rel, leads: href === new URL(textContent).href }))`);
    for (const { target, rel, leads } of all) {
      expect(target).toBe("_blank");
      expect(rel.split(" ")).toEqual(expect.arrayContaining(["noopener", "noreferrer"]));
      expect(leads).toBe(true);
    }

    bob.send("https://pаypal.example/?https://xn--pypal-4ve.example\n");
    await page.until(`textsOf("lines").at(-1)?.endsWith("[xn--pypal-4ve.example]")`);

    // Letters that look alike, or cannot be seen, and more links than anybody writes.
    bob.send("https://bаnk.example/x and https://bank.example\u200b.evil.example\n");
    const hosts = ["xn--bnk-6cd.example", "bank.example.evil.example"];
    await page.sees(
      `[bob] https://bаnk.example/x [${hosts[0]}] and https://bank.example\u200b.evil.example [${hosts[1]}]`,
    );
    bob.send(`${"http://a ".repeat(100)}\n`);
    await page.until(`$("lines").lastElementChild.querySelectorAll("a").length === 20`);
  });

  testInBrowser("marks what is one's own, private, or meant for the reader", async () => {
    const { bob, page } = await meetInPage();
    bob.send("hello\nmalice is not meant\nhi ALICE!\n/msg alice psst\n");
    await page.sees("[bob] to you only: psst");
    await page.say("yo");
    await page.sees("[alice] yo");
    await page.say("/msg bob shh");
    await page.sees("[alice] to bob only: shh");
    await page.say("/nick anna");
    await page.arrives("anna");
    bob.send("bye alice\nbye anna\n");
    await page.sees("[bob] bye anna");
    const rows = await page.rows();
    expect(rows.filter(({ kind }) => kind !== "day").map(({ kind, text }) => [kind, text])).toEqual(
      [
        ["said", "[bob] hello"],
        ["said", "[bob] malice is not meant"],
        ["said mention", "[bob] hi ALICE!"],
        ["private", "[bob] to you only: psst"],
        ["said own", "[alice] yo"],
        ["private own", "[alice] to bob only: shh"],
        ["notice", "alice is now called anna"],
        ["said", "[bob] bye alice"],
        ["said mention", "[bob] bye anna"],
      ],
    );

    // Not by colour alone: a mention has a bar beside it.
    const shadowOf = (row: string) =>
      page.evaluate(`getComputedStyle(document.querySelector("#lines ${row}")).boxShadow`);
    expect(await shadowOf(".mention")).not.toBe(await shadowOf(".said:not(.mention)"));
  });

  testInBrowser("has the date between two days, and the time of each line", async () => {
    const at = (day: number, hour: number, minute: number) =>
      new Date(2026, 8, day, hour, minute).getTime() * 1000;
    const file = writeHistory([
      [at(1, 0, 0), ""],
      [at(23, 13, 7), "[bob] early\n"],
      [at(23, 23, 59), "[bob] late\n[carol] later\n"],
      [at(24, 0, 1), "[bob] next day\n"],
    ]);
    const page = await openPage(open({ web: 0, db: file, keep: 0 }));
    const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
    await page.view.cdp("Emulation.setTimezoneOverride", { timezoneId: timeZone });
    await page.enter("alice");
    await page.sees("[bob] next day");
    const rows = await page.rows();
    expect(rows.slice(0, 6).map(({ kind, time, name }) => `${kind} ${time} ${name}`)).toEqual([
      "day  ",
      "said 13:07 bob",
      "said 23:59 bob",
      "said 23:59 carol",
      "day  ",
      "said 00:01 bob",
    ]);
    const days = rows.filter(({ kind }) => kind === "day").map(({ words }) => words);
    expect(days[0]).toContain("September 23");
    expect(days[1]).toContain("September 24");
    expect(days).toHaveLength(2);
  });

  testInBrowser("folds no departure that has a reason", async () => {
    const room = open({ web: 0, db: withAlice() });
    const [, bob] = await enterAll(room, LOGIN, "bob");
    const page = await enterByPage(room, "carol");
    await enter(room, LOGIN);
    await page.sees("alice has left the chat (came in from elsewhere)");
    bob.socket.end();
    await page.sees("bob has left the chat");
  });

  testInBrowser("folds arrivals and departures, but not what an operator did", async () => {
    const room = open({ web: 0 });
    const page = await enterByPage(room, "alice");
    const [bob, ...others] = await enterAll(room, "bob", "carol", "dave", "erin");
    await page.sees("bob, carol and 2 others have joined");
    for (const peer of others.slice(0, 2)) peer.socket.end();
    await bob.until(/^\* dave has left/);
    room.command("/kick erin spam");
    await page.sees("erin has left the chat (kicked by the server: spam)");
    bob.socket.end();
    await page.sees("bob has left the chat");
    const notices = (await page.rows()).filter(({ kind }) => kind === "notice");
    expect(notices.map(({ words }) => words)).toEqual([
      "bob, carol and 2 others have joined",
      "carol and dave have left",
      "erin has left the chat (kicked by the server: spam)",
      "bob has left the chat",
    ]);
    await page.lists("alice (you)");
  });

  testInBrowser("hides what an ignored person says, until told otherwise", async () => {
    const room = open({ web: 0 });
    const [bob, carol] = await enterAll(room, "bob", "carol");
    const page = await enterByPage(room, "alice");
    await page.say("/ignore BOB");
    bob.send("one\n/msg alice two\n");
    await bob.ping();
    carol.send("three\n");
    await page.sees("[carol] three");
    await page.say("/ignore bob");
    bob.send("four\n");
    await page.sees("[bob] four");
    expect(await page.said()).toEqual(["[carol] three", "[bob] four"]);
  });
});

describe("colours in the page", () => {
  /** A name for each colour of the client in a terminal, in the order of its list. */
  const TWELVE = times(12, (colour) => {
    const isOfColour = (name: string) => Bun.hash.crc32(name) % 12 === colour;
    return called("p", 200).find(isOfColour) ?? "";
  });

  // The hues of 28, 30, 31, 62, 64, 97, 99, 130, 131, 133, 161 and 163 among the 256 colours.
  const HUES = [120, 180, 194, 240, 78, 270, 255, 33, 0, 300, 334, 311];

  function hueOf([red = 0, green = 0, blue = 0]: number[]): number {
    const most = Math.max(red, green, blue);
    const range = most - Math.min(red, green, blue);
    if (most === red) return (60 * ((green - blue) / range) + 360) % 360;
    return most === green ? 60 * ((blue - red) / range) + 120 : 60 * ((red - green) / range) + 240;
  }

  /** The number of the hue that is nearest. */
  function nearest(hue: number): number {
    const distances = HUES.map((other) => Math.abs(((hue - other + 540) % 360) - 180));
    return distances.indexOf(Math.min(...distances));
  }

  testInBrowser(
    "are those of the terminal for each name, and all words are easy to read",
    async () => {
      const room = open({ web: 0 });
      const peers = await enterAll(room, ...TWELVE);
      const page = await enterByPage(room, "alice");
      for (const line of ["hello", "hi alice, https://x.example/", "/msg alice psst"])
        for (const peer of peers) {
          peer.send(`${line}\n`); // one after the other, so that each name is seen
          await peer.ping();
        }
      for (const peer of peers) peer.socket.end();
      await page.until(`textsOf("lines").at(-1)?.endsWith(" and 10 others have left")`);

      // With each of the colours for what is one's own.
      for (const name of TWELVE) {
        await page.say(`/nick ${name}`);
        await page.say("own");
        await page.say(`/msg ${name} own`);
      }
      await page.sees(`[${TWELVE.at(-1)}] to ${TWELVE.at(-1)} only: own`);
      await page.say("/msg nobody psst");
      await page.sees("Nobody here is called nobody.");
      for (const kind of [
        ".said:not(.own)",
        ".mention",
        ".private:not(.own)",
        ".said.own",
        ".private.own",
      ])
        await page.until(`
          Array.from($("lines").querySelectorAll("${kind} .name")).filter(isSeen).length >= 12`);

      for (const isDark of [false, true]) {
        await page.setDark(isDark);
        const colours = await page.evaluate<Record<string, number[]>>(`
        Object.fromEntries(Array.from(document.querySelectorAll("#lines .said:not(.own) .name"))
          .filter(isSeen).map((name) => [name.textContent, colourOf(name, true)]))`);
        const hues = TWELVE.map((name) => hueOf(colours[name] ?? []));
        expect(hues.map(nearest)).toEqual(times(12, (colour) => colour));
        expect(await page.pale()).toEqual([]);
      }
    },
  );

  testInBrowser("follow the system, at the door and in the room", async () => {
    const room = open({ web: 0 });
    const page = await openPage(room);
    await page.setDark(true);
    const dark = await page.evaluate<number[]>("colourOf(document.body)");
    expect(Math.max(...dark)).toBeLessThan(80);
    expect(await page.pale()).toEqual([]);
    await page.fill("name", "!");
    await page.press("Enter");
    await page.has("refusal", NAME_RULE.slice(2));
    expect(await page.pale()).toEqual([]);
    await page.setDark(false);
    expect(Math.min(...(await page.evaluate<number[]>("colourOf(document.body)")))).toBeGreaterThan(
      220,
    );
    expect(await page.pale()).toEqual([]);
  });
});

describe("the people in the page", () => {
  testInBrowser("stand in the order of their coming or of their names", async () => {
    const room = open({ web: 0 });
    const [zoe, bob] = await enterAll(room, "zoe", "bob");
    const page = await enterByPage(room, "mary");
    await enter(room, "anna");
    await page.lists("zoe", "bob", "mary (you)", "anna");
    await page.has("count", "4 people here");

    await page.click("order");
    await page.lists("anna", "bob", "mary (you)", "zoe");
    zoe.send("/nick carol\n");
    bob.socket.end();
    await page.lists("anna", "carol", "mary (you)");

    await page.reload();
    await page.press("Enter");
    await page.arrives("mary");
    await page.lists("anna", "carol", "mary (you)");
    await page.click("order");
    await page.lists("carol", "anna", "mary (you)");
  });

  testInBrowser("are counted where they are too many to list", async () => {
    const room = open({ web: 0 });
    await enterTogether(room, called("user", 999));
    const page = await enterByPage(room, "alice");
    await page.has("count", "1000 people here");
    const names = await page.names();
    expect(names).toHaveLength(201);
    expect(names.at(-1)).toBe("and 800 more");
    await page.view.type("user998");
    await page.press("Tab"); // also those who are not in the list
    expect(await page.value()).toBe("user998: ");
  });

  testInBrowser("can be written to by a press on their names", async () => {
    const { bob, page } = await meetInPage();
    await page.view.click("#names button");
    expect(await page.value()).toBe("/msg bob ");
    expect(await page.focus()).toBe("text");
    await page.say("psst");
    expect(await bob.line()).toBe("[alice -> bob] psst");
    await page.sees("[alice] to bob only: psst");
    bob.send("hello\n");
    await page.sees("[bob] hello");
    await page.view.click("#lines .said:not(.own) .name");
    expect(await page.value()).toBe("/msg bob ");
  });
});

describe("writing in the page", () => {
  testInBrowser(
    "Tab completes names and commands, again the next one, and is no trap",
    async () => {
      const room = open({ web: 0 });
      const [bella] = await enterAll(room, "bella", "bernd", "carol");
      const page = await enterByPage(room, "alice");
      bella.send("hello\n");
      await page.sees("[bella] hello");

      const completed = async (typed: string, ...keys: string[]) => {
        await page.fill("text", typed);
        await page.press(...(keys.length > 0 ? keys : ["Tab"]));
        expect(await page.focus()).toBe("text");
        return await page.value();
      };
      expect(await completed("be")).toBe("bella: ");
      expect(await completed("BE", "Tab", "Tab")).toBe("bernd: ");
      expect(await completed("be", "Tab", "Tab", "Tab")).toBe("be");
      expect(await completed("hi @ca")).toBe("hi @carol ");
      expect(await completed("/hi")).toBe("/history ");
      expect(await completed("/msg ber")).toBe("/msg bernd ");
      expect(await completed("xbe", "Home", "ArrowRight", "Delete", "Delete", "x")).toBe("xx");

      for (const typed of ["", "nothing fits", "hello "]) {
        await page.run(`$("text").value = ""`);
        await page.fill("text", typed);
        await page.press("Tab");
        expect(await page.focus()).toBe("send");
        await page.view.press("Tab", { modifiers: ["Shift"] });
        expect(await page.focus()).toBe("text");
        expect(await page.value()).toBe(typed);
      }
    },
  );

  testInBrowser("Up and Down bring back what was sent, and keep the draft", async () => {
    const { bob, page } = await meetInPage();
    await page.say("one");
    await page.say("/who");
    await page.view.type("dra");
    const values: string[] = [];
    for (const key of ["ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowDown"]) {
      await page.press(key);
      values.push(await page.value());
    }
    expect(values).toEqual(["/who", "one", "one", "/who", "dra", "dra"]);
    await page.say("ft");
    expect(await bob.lines(2)).toEqual(["[alice] one", "[alice] draft"]);
    expect(await bob.ping()).toEqual([]);
  });

  testInBrowser("several lines are said as lines, and none of them is a command", async () => {
    const { bob, page } = await meetInPage();
    await page.view.type("one");
    await page.view.press("Enter", { modifiers: ["Shift"] });
    await page.view.type("two");
    expect(await page.value()).toBe("one\ntwo");
    expect(await page.evaluate(`$("send").textContent`)).toBe("Send 2 lines");
    await page.press("Enter");
    expect(await bob.lines(2)).toEqual(["[alice] one", "[alice] two"]);
    expect(await page.evaluate(`$("send").textContent`)).toBe("Send");

    await page.view.type("/quit\n\n  indented\n//x\n/nick bob\nlast\n");
    expect(await page.evaluate(`$("send").textContent`)).toBe("Send 5 lines");
    await page.click("send");
    expect(await bob.lines(5)).toEqual(
      ["/quit", "  indented", "//x", "/nick bob", "last"].map((line) => `[alice] ${line}`),
    );
    await page.say("//one");
    expect(await bob.line()).toBe("[alice] /one");
    await page.sees("[alice] /one");
  });

  testInBrowser("what an input method composes is not sent before it is done", async () => {
    const { bob, page } = await meetInPage();
    const compose = { text: "にほん", selectionStart: 3, selectionEnd: 3 };
    await page.view.cdp("Input.imeSetComposition", compose);
    const key = { type: "rawKeyDown", key: "Enter", code: "Enter" };
    for (const windowsVirtualKeyCode of [13, 229])
      await page.view.cdp("Input.dispatchKeyEvent", {
        ...key,
        windowsVirtualKeyCode,
      });
    await page.view.cdp("Input.insertText", { text: "日本" });
    // Safari ends the composition before it tells of the key, which has this code.
    await page.view.cdp("Input.dispatchKeyEvent", {
      ...key,
      windowsVirtualKeyCode: 229,
    });
    expect(await page.value()).toBe("日本");
    expect(await bob.ping()).toEqual([]);
    await page.press("Enter");
    expect(await bob.line()).toBe("[alice] 日本");
  });

  testInBrowser("a password that everybody would hear stays in the box", async () => {
    const { bob, page } = await meetInPage();
    for (const [number, typed] of [" /register hunter22", "hello\n/password hunter22"].entries()) {
      await page.fill("text", typed);
      await page.press("Enter");
      const warnings = `textsOf("lines").filter((text) => text.includes("may hold a password"))`;
      await page.until(`${warnings}.length === ${number + 1}`);
      expect(await page.value()).toBe(typed);
    }
    for (const word of ["constructor", "__proto__"]) {
      await page.fill("text", word);
      await page.press("Enter");
      expect(await bob.line()).toBe(`[alice] ${word}`);
    }
  });

  testInBrowser("what is for one person is not said to everybody", async () => {
    const { bob, page } = await meetInPage();
    for (const [number, typed] of ["/msg bob one\ntwo", "one\n /msg bob two"].entries()) {
      await page.fill("text", typed);
      await page.click("send");
      const warnings = `textsOf("lines").filter((text) => text.includes("to one person only"))`;
      await page.until(`${warnings}.length === ${number + 1}`);
      expect(await page.value()).toBe(typed);
    }

    await page.lists("bob", "alice (you)");
    await page.fill("text", "/register hunter22");
    await page.run(`$("names").querySelector("button").click()`);
    expect(await page.value()).toBe("/msg bob ");
    await page.fill("text", "/msg bob /register hunter22");
    await page.press("Enter");
    await page.until(`textsOf("lines").some((text) => text.includes("may hold a password"))`);
    expect(await bob.ping()).toEqual([]);
  });

  testInBrowser("a line that is too long stays in the box, with a word about it", async () => {
    const { bob, page } = await meetInPage();
    const long = "é".repeat(2048);
    await page.say(`${long}x`);
    await page.until(`textsOf("lines").some((text) => text.includes("4096"))`);
    expect(await page.value()).toBe(`${long}x`);
    await page.press("Backspace", "Enter");
    expect(await bob.line()).toBe(`[alice] ${long}`);
    await page.sees(`[alice] ${long}`);
    expect(await page.value()).toBe("");
  });
});

describe("scrolling in the page", () => {
  const rowCount = (page: Page) => page.evaluate<number>(`$("lines").childElementCount`);

  /** How far the log is scrolled, once it stands still for a frame. */
  async function restingPlace(page: Page): Promise<number> {
    for (let before = NaN; ;) {
      const place = await page.evaluate<number>(`
        new Promise(requestAnimationFrame).then(() => $("log").scrollTop)`);
      if (place === before) return place;
      before = place;
    }
  }

  testInBrowser(
    "follows the end, unless one reads higher up, and then says what is new",
    async () => {
      const { bob, page } = await meetInPage();
      bob.send(toText(numbered(100)));
      await page.sees("[bob] line 99");
      await page.until("isAtEnd()");

      await page.view.scroll(0, -600);
      await page.until("!isAtEnd()");
      const before = await restingPlace(page);
      bob.send("a\nb\nc\n");
      await page.until(
        `$("news").checkVisibility() && $("news").textContent.startsWith("3 new lines")`,
      );
      expect(await restingPlace(page)).toBe(before);
      await page.click("news");
      await page.until(`isAtEnd() && !$("news").checkVisibility()`);
      expect(await page.focus()).toBe("text");

      await page.press("PageUp");
      await page.until("!isAtEnd()");
      bob.send("d\n");
      await page.until(`$("news").textContent.startsWith("1 new line ")`);
      await page.say("own"); // what one says oneself is seen
      await page.sees("[alice] own");
      await page.until(`isAtEnd() && !$("news").checkVisibility()`);

      await page.view.type(toText(numbered(4)).trimEnd());
      await page.until("isAtEnd()"); // though the box has grown
      await page.view.resize(600, 400);
      await page.until("innerHeight === 400 && isAtEnd()");
    },
  );

  testInBrowser(
    "leads back to the very first line, and what one looks at stays in its place",
    async () => {
      const start = Date.now() * 1000 - 3_600_000_000; // an hour ago
      const lines = numbered(1200, "old");
      const said = lines.map((line, number): Row => [start + number, `${line}\n`]);
      const room = open({ web: 0, db: writeHistory([[start - 1, ""], ...said]) });
      const page = await enterByPage(room, "alice");
      await page.sees("[old] line 1199");
      await page.run(`
      // Notes where the first row in sight stands, before and after others are put above it.
      globalThis.moves = [];
      const topOf = (row) => row.getBoundingClientRect().top;
      let sight = [];
      const look = () => {
        const edge = topOf($("log"));
        const row = Array.from($("lines").children).find((one) => topOf(one) + one.offsetHeight > edge);
        sight = [row, topOf(row)];
      };
      new MutationObserver(() => {
        const [row, top] = sight;
        if (row?.isConnected) moves.push(topOf(row) - top);
        look();
      }).observe($("lines"), { childList: true });
      $("log").addEventListener("scroll", look);`);

      for (;;) {
        const [first] = await page.said();
        if (first === "[old] line 0") break;
        await page.run(`$("log").scrollTop = 300`);
        await page.until(`textsOf("lines").find((text) => text[0] === "[") !== "${first}"`);
        expect(await rowCount(page)).toBeLessThanOrEqual(1000);
      }
      const moves = await page.evaluate<number[]>("moves");
      expect(moves.length).toBeGreaterThan(5);
      expect(moves.filter((move) => Math.abs(move) > 2)).toEqual([]);
      await page.run(`$("log").scrollTop = 0`);
      await page.until(`rowsOf("lines").some(({ kind, words }) =>
      kind === "notice" && words.includes("begins"))`);
      const above = await page.said();
      expect(above).toEqual(lines.slice(0, above.length));

      // And down again, to what is said now.
      const bob = await enter(room, "bob");
      bob.send("hello\n");
      await page.until(`$("news").checkVisibility()`);
      while (!(await page.texts()).includes("[bob] hello")) {
        await page.run(`$("log").scrollTop = $("log").scrollHeight`);
        await page.until(`$("log").scrollHeight - $("log").scrollTop - $("log").clientHeight > 50 ||
        textsOf("lines").includes("[bob] hello")`);
      }
      const below = await page.said();
      expect(below).toEqual([...lines.slice(1 - below.length), "[bob] hello"]);
    },
  );

  testInBrowser(
    "ten thousand lines at once are all there, and a thousand of them in the page",
    async () => {
      const { bob, page } = await meetInPage();
      bob.send(toText(numbered(10_000)));
      await page.sees("[bob] line 9999");
      await page.until("isAtEnd()");
      expect(await rowCount(page)).toBeLessThanOrEqual(1000);
      const said = await page.said();
      expect(said).toEqual(numbered(10_000, "bob").slice(-said.length));
      expect(said.length).toBeGreaterThan(900);
    },
  );
});
describe("the attention of the page", () => {
  testInBrowser("the title counts what was not seen, and is calm again when it is", async () => {
    const { bob, page } = await meetInPage();
    bob.send("seen\n");
    await page.sees("[bob] seen");
    expect(await page.evaluate("document.title")).toBe("bun-chat");
    await page.lookAt(false);
    bob.send("one\n");
    await page.until(`document.title.startsWith("(1) ")`);
    bob.send("two\n/nick robert\nhi alice\n");
    await page.until(`document.title.startsWith("(3) robert ")`);
    await page.lookAt(true);
    await page.until(`document.title === "bun-chat"`);
  });

  testInBrowser("a tone rings for what is meant for the reader, who is elsewhere", async () => {
    const { bob, page } = await meetInPage();
    await page.run(`
      globalThis.tones = 0;
      const { start } = AudioScheduledSourceNode.prototype;
      AudioScheduledSourceNode.prototype.start = function (...when) {
        tones++;
        return start.apply(this, when);
      }`);
    const tonesAfter = async (line: string) => {
      bob.send(`${line}\n`);
      await page.until(
        `textsOf("lines").at(-1)?.endsWith(${JSON.stringify(line.split(" ").at(-1))})`,
      );
      return await page.evaluate<number>("tones");
    };
    await page.say("hi"); // a page may make no sound before somebody has done something in it
    await page.sees("[alice] hi");
    expect(await tonesAfter("alice 1")).toBe(0);
    await page.lookAt(false);
    expect(await tonesAfter("hello 2")).toBe(0);
    expect(await tonesAfter("alice 3")).toBe(1);
    expect(await tonesAfter("/msg alice 4")).toBe(2);
    await page.lookAt(true);

    const pressed = () => page.evaluate(`$("bell").ariaPressed`);
    expect(await pressed()).toBe("true");
    await page.click("bell");
    expect(await pressed()).toBe("false");
    await page.lookAt(false);
    expect(await tonesAfter("alice 5")).toBe(2);
    await page.reload();
    expect(await pressed()).toBe("false");
  });

  testInBrowser("notifications come for that, if they were asked for and allowed", async () => {
    const room = open({ web: 0 });
    const bob = await enter(room, "bob");
    const page = await openPage(room);
    await page.run(`
      globalThis.notes = [];
      globalThis.Notification = class {
        static permission = "default";
        static async requestPermission() {
          Notification.permission = notes.length === 0 ? "denied" : "granted";
          notes.push("asked");
          return Notification.permission;
        }
        constructor(title, { body }) {
          notes.push(title + ": " + body);
        }
      }`);
    await page.enter("alice");
    const pressed = () => page.evaluate(`$("notify").ariaPressed`);
    expect(await pressed()).toBe("false");
    await page.click("notify");
    await page.until("notes.length === 1");
    expect(await pressed()).toBe("false");
    await page.click("notify");
    await page.until(`$("notify").ariaPressed === "true"`);

    bob.send("alice, seen\n");
    await page.sees("[bob] alice, seen");
    await page.lookAt(false);
    bob.send("hello\n/msg alice psst\n");
    await page.until("notes.length === 3");
    const notes = await page.evaluate<string[]>("notes");
    expect(notes.slice(0, 2)).toEqual(["asked", "asked"]);
    expect(notes[2]).toStartWith("bob");
    expect(notes[2]).toEndWith(": psst");
  });
});

describe("a page that has lost the connection", () => {
  testInBrowser(
    "shows what waits, keeps the draft, and comes back as soon as there is a network",
    async () => {
      const { room, bob, page } = await meetInPage();
      await page.say("one");
      await page.sees("[alice] one");
      await page.stopClock();
      cutOff(room, "alice");
      await page.until(`$("status").textContent.includes("Trying again in ")`);
      bob.send("missed\n");
      await page.say("two");
      await page.sees("[alice] two", "waiting");
      await page.view.type("/three\n/four");
      await page.press("Enter");
      await page.sees("[alice] /four", "waiting");
      expect(await page.texts("waiting")).toEqual([
        "[alice] two",
        "[alice] /three",
        "[alice] /four",
      ]);
      expect(await page.pale()).toEqual([]);
      await page.view.type("draft");
      await page.until(`!(dispatchEvent(new Event("beforeunload", { cancelable: true })))`); // it asks

      await page.goOnline();
      await page.arrives("alice");
      await page.sees("[alice] /four");
      await page.until(`$("waiting").childElementCount === 0`);
      expect(await page.said()).toEqual([
        "[alice] one",
        "[bob] missed",
        "[alice] two",
        "[alice] /three",
        "[alice] /four",
      ]);
      expect(await page.value()).toBe("draft");
      await page.until(`dispatchEvent(new Event("beforeunload", { cancelable: true }))`);
      const heard = (await bob.ping()).filter((line) => line.startsWith("["));
      expect(heard).toEqual(["[alice] one", "[alice] two", "[alice] /three", "[alice] /four"]);
    },
  );

  testInBrowser(
    "misses nothing and doubles nothing, wherever it is cut, also by a new server",
    async () => {
      const file = newFile();
      let room = open({ web: 0, db: file });
      const { webPort } = room;
      const proxy = cutter(() => webPort ?? NaN, randomNumbers(1));
      const page = await openPage({ webPort: proxy.port });
      await page.enter("alice");
      await page.run("setInterval(() => dispatchEvent(new Event('online')), 20)");
      proxy.state.isCalm = false;
      let bob = await enter(room, "bob");
      for (let number = 0; number < 40; number++) {
        bob.send(`line ${number}\n`);
        await page.say(`line ${number}`);
        if (number !== 20) continue;
        await bob.ping();
        await room.stop();
        room = open({ web: webPort, db: file });
        bob = await enter(room, "bob");
      }
      await bob.ping();
      proxy.state.isCalm = true;
      await page.until(`$("waiting").childElementCount === 0`);
      await page.until(`rowsOf("lines").filter(({ name }) => name).length >= 80`);
      const said = await page.said();
      for (const name of ["alice", "bob"])
        expect(said.filter((line) => line.startsWith(`[${name}]`))).toEqual(numbered(40, name));
      expect(proxy.state.cuts).toBeGreaterThan(0);

      const { peer } = await follow(room, "carol");
      const heard = await linesUntil(peer, "* carol has joined the chat");
      expect(heard.filter((line) => line.startsWith("["))).toEqual(said);
      expect(await page.texts()).not.toContain("Some lines are missing here.");
    },
  );

  testInBrowser("comes back by itself when the server does", async () => {
    const room = open({ web: 0, db: newFile() });
    const page = await enterByPage(room, "alice");
    await room.stop();
    await page.sees("The server is shutting down");
    await page.until(`$("status").textContent.includes("Trying again in ")`);
    const again = open({ web: room.webPort });
    await page.arrives("alice");
    await page.sees("Some lines are missing here."); // it is another history
    await page.say("hello");
    await page.sees("[alice] hello");
    expect(namesIn(again)).toEqual(["alice"]);
  });

  testInBrowser(
    "is at the door when it was shown out, with the reason, and stays there",
    async () => {
      const room = open({ web: 0, db: newFile() });
      const bob = await enter(room, "bob");
      const page = await enterByPage(room, "alice");
      await page.view.type("draft");
      room.command("/kick alice spam");
      await page.until(`$("door").checkVisibility()`);
      expect(await page.evaluate(`$("refusal").textContent`)).toBe(
        "You were kicked by the server: spam",
      );
      await page.goOnline();
      await page.run("document.dispatchEvent(new Event('visibilitychange'))");
      await page.fill("name", "alice");
      await bob.until(/^\* alice has left/);
      expect(await bob.ping()).toEqual([]);
      expect(namesIn(room)).toEqual(["bob"]);
      await page.press("Enter");
      await page.arrives("alice");
      expect(await page.value()).toBe("draft");
      await page.lists("bob", "alice (you)");
      await page.run(`$("names").querySelector("button").click()`);
      expect(await page.value()).toBe("/msg bob draft");

      room.command("/kick alice again");
      await page.until(`$("door").checkVisibility()`);
      await page.fill("name", "anna");
      await page.press("Enter");
      await page.arrives("anna");
      expect(await page.value()).toBe(""); // that was somebody else's draft
    },
  );
});

describe("a page whose way to the server is gone without a word", () => {
  testInBrowser("finds out, and loses nothing", async () => {
    const room = open({ web: 0 });
    const bob = await enter(room, "bob");
    const page = await enterByPage(room, "alice");
    expect(await bob.line()).toBe("* alice has joined the chat");
    const lost = room.clients.find(({ name }) => name === "alice")?.socket;
    if (!lost) throw new Error("alice is not here");
    lost.pause();
    lost.write = (_, __, length) => length; // it goes nowhere
    await page.say("are you there?");

    // A minute passes, and what takes seconds does not.
    await page.run(`
      const { now } = Date;
      const start = setTimeout;
      Date.now = () => now() + 60_000;
      globalThis.setTimeout = (work, ms, ...rest) => start(work, ms / 20, ...rest);
      document.dispatchEvent(new Event("visibilitychange"))`);
    await page.until(`$("status").textContent.includes("Trying again")`);
    lost.terminate(); // the server has found out, too
    await page.arrives("alice");
    expect(await bob.until("[alice] are you there?")).toEqual([
      "* alice has left the chat",
      "* alice has joined the chat",
    ]);
    expect(await bob.ping()).toEqual([]);
  });

  testInBrowser("stays when somebody writes on instead of leaving", async () => {
    const file = newFile();
    const room = open({ web: 0, db: file });
    const page = await enterByPage(room, "alice");
    await room.stop();
    await page.until(`$("status").textContent.includes("Trying again")`);
    await page.say("one");
    await page.click("leave");
    await page.sees("1 line has not arrived yet. Press Leave again to leave anyway.");
    await page.say("two");
    const again = open({ web: room.webPort, db: file });
    await page.goOnline();
    await page.sees("[alice] two");
    expect(namesIn(again)).toEqual(["alice"]);
  });

  testInBrowser("says that a private message may be lost by leaving", async () => {
    const room = open({ web: 0 });
    await enter(room, "bob");
    const page = await enterByPage(room, "alice");
    const lost = room.clients.find(({ name }) => name === "alice")?.socket;
    if (!lost) throw new Error("alice is not here");
    lost.pause();
    await page.say("/msg bob it is important");
    await page.click("leave");
    await page.has("status", "Leaving…");
    lost.terminate();
    await page.has("refusal", "What you asked for last may not have arrived.");
  });

  testInBrowser("says what is lost by leaving", async () => {
    const room = open({ web: 0 });
    const page = await enterByPage(room, "alice");
    await room.stop();
    await page.until(`$("status").textContent.includes("Trying again")`);
    await page.say("one");
    await page.click("leave");
    await page.sees("1 line has not arrived yet. Press Leave again to leave anyway.");
    await page.run(`$("text").focus()`);
    await page.say("/quit");
    await page.has("refusal", "1 line of yours may be lost.");
  });
});

describe("passwords in the page", () => {
  /** All that the page remembers or shows. */
  const traces = (page: Page) =>
    page.evaluate<string>(`JSON.stringify([
      { ...localStorage }, { ...sessionStorage }, document.cookie, document.body.textContent,
      decodeURI(location.href)])`);

  testInBrowser("a registered name asks for its own, and comes back with it", async () => {
    const room = open({ web: 0, db: withAlice() });
    const page = await openPage(room);
    expect(await page.evaluate(`$("password").checkVisibility()`)).toBe(false);
    await page.fill("name", "alice");
    await page.press("Enter");
    await page.until(`$("password").checkVisibility()`);
    expect(await page.evaluate(`$("refusal").textContent`)).toContain("registered");
    await page.until(`document.activeElement.id === "password"`);
    await page.say("wrong");
    await page.until(`!$("enter").disabled`);
    await page.has("refusal", "The password is wrong.");
    expect(await page.evaluate(`$("password").checkVisibility()`)).toBe(true);
    await page.fill("password", PASSWORD);
    await page.press("Enter");
    await page.arrives("alice");

    await page.stopClock();
    cutOff(room, "alice");
    await page.until(`$("status").textContent.includes("Trying again in ")`);
    await page.goOnline();
    await page.arrives("alice");
    expect(await traces(page)).not.toContain(PASSWORD);

    await page.reload();
    expect(await page.value("password")).toBe("");
    expect(await page.value("name")).toBe("alice");
  });

  testInBrowser("are not asked for another name", async () => {
    const room = open({ web: 0, db: withAlice() });
    const page = await openPage(room);
    await page.fill("name", "alice");
    await page.press("Enter");
    await page.until(`$("password").checkVisibility()`);
    await page.fill("password", PASSWORD);
    await page.fill("name", "bob");
    expect(await page.evaluate(`$("password").checkVisibility()`)).toBe(false);
    await page.press("Enter");
    await page.arrives("bob");
  });

  testInBrowser("a name gets one in a dialog, twice the same", async () => {
    const room = open({ web: 0, db: newFile() });
    const page = await enterByPage(room, "bob");
    await page.say("/register");
    await page.until(`$("secret").open`);
    expect(await page.focus()).toBe("new-password");
    await page.view.type("s3cr et!!");
    await page.press("Tab");
    expect(await page.focus()).toBe("again");
    await page.say("something else");
    await page.until(`$("secret").textContent.includes("differ")`);
    expect(await page.evaluate(`$("secret").open`)).toBe(true);
    await page.fill("again", "s3cr et!!");
    await page.press("Enter");
    await page.sees(registered("bob").slice(2));
    expect(await page.evaluate(`$("secret").open`)).toBe(false);
    expect(await page.focus()).toBe("text");
    await page.press("ArrowUp");
    expect(await page.value()).not.toContain("s3cr");
    expect(await traces(page)).not.toContain("s3cr");

    await page.stopClock();
    cutOff(room, "bob");
    await page.until(`$("status").textContent.includes("Trying again in ")`);
    expect(await refusalOf(room, "bob")).toEqual([askedFor("bob")]);
    await page.goOnline();
    await page.arrives("bob");
  });

  testInBrowser("typed behind a command are hidden, not shown and not brought back", async () => {
    const room = open({ web: 0, db: newFile() });
    const page = await enterByPage(room, "bob");
    const security = () => page.evaluate(`getComputedStyle($("text")).webkitTextSecurity`);
    await page.view.type("/register ");
    await page.view.type("s3cret!!!");
    expect(await security()).toBe("disc");
    await page.press("Enter");
    await page.sees(registered("bob").slice(2));
    expect(await security()).toBe("none");
    await page.press("ArrowUp");
    expect(await page.value()).toBe("");
    expect(await traces(page)).not.toContain("s3cret");
  });

  testInBrowser("that are no longer right lead to the door", async () => {
    const room = open({ web: 0, db: withAlice() });
    const page = await openPage(room);
    await page.fill("name", "alice");
    await page.press("Enter");
    await page.until(`document.activeElement.id === "password"`);
    await page.say(PASSWORD);
    await page.arrives("alice");
    const elsewhere = await enter(room, LOGIN);
    await page.has("refusal", "You have come in from elsewhere.");
    expect(await page.evaluate(`$("door").checkVisibility()`)).toBe(true);
    await page.goOnline();
    expect(await elsewhere.ping()).not.toContain("* alice has joined the chat");
  });
});

describe("the page for everybody", () => {
  testInBrowser("fits on a phone, where the people are behind a button", async () => {
    const room = open({ web: 0 });
    const bob = await enter(room, "b".repeat(32));
    const page = await openPage(room, { width: 390, height: 844 });
    expect(await page.isTooWide()).toBe(false);
    await page.enter("alice");
    bob.send(`${"word ".repeat(100)}\n/msg alice ${"x".repeat(500)}\n`);
    await page.until(`rowsOf("lines").some(({ kind }) => kind === "private")`);
    expect(await page.isTooWide()).toBe(false);
    for (const isDark of [false, true]) {
      await page.setDark(isDark);
      expect(await page.pale()).toEqual([]);
    }

    expect(await page.evaluate(`$("people").checkVisibility()`)).toBe(false);
    await page.has("crowd", "2 people");
    expect(await page.evaluate(`$("crowd").ariaExpanded`)).toBe("false");
    await page.click("crowd");
    await page.until(`$("people").checkVisibility() && $("crowd").ariaExpanded === "true"`);
    expect(await page.isTooWide()).toBe(false);
    await page.view.click("#names button");
    await page.until(`!$("people").checkVisibility()`);
    expect(await page.value()).toBe(`/msg ${"b".repeat(32)} `);

    // Nothing is too small for a finger, or leaves the screen when the keyboard comes.
    await page.view.resize(390, 400);
    await page.until("innerHeight === 400");
    const bottom = await page.evaluate<number>(`$("send").getBoundingClientRect().bottom`);
    expect(bottom).toBeLessThanOrEqual(400);
  });

  testInBrowser("can be used by keyboard alone, and shows where the focus is", async () => {
    const room = open({ web: 0 });
    await enter(room, "bob");
    const page = await openPage(room);

    /** Goes once around by Tab, and waits at each stop for a mark of the focus. */
    async function goAround() {
      const stops = new Set<string>();
      await page.run("document.activeElement.blur()");
      for (;;) {
        await page.press("Tab");
        const stop = await page.evaluate<string>(`
          document.activeElement.closest("#names") ? "a name" : document.activeElement.id`);
        if (stops.has(stop)) return [...stops].filter((id) => id !== "").toSorted();
        stops.add(stop);
        await page.until(`
          document.activeElement === document.body ||
          (document.activeElement.matches(":focus-visible") &&
            getComputedStyle(document.activeElement).outlineStyle === "solid")`);
      }
    }
    expect(await goAround()).toEqual(["enter", "name"]);
    await page.enter("alice");
    await page.lists("bob", "alice (you)");
    const all = ["a name", "bell", "leave", "log", "notify", "order", "send", "text"];
    expect(await goAround()).toEqual(all);
  });

  testInBrowser("has names for a screen reader, and a log that it reads out", async () => {
    const room = open({ web: 0, db: withAlice() });
    const bob = await enter(room, "bob");
    const page = await openPage(room);

    type Node = { role?: { value: string }; name?: { value: string }; ignored: boolean };
    /** What can be used, with its names. */
    async function controls(...roles: string[]) {
      const { nodes } = await page.view.cdp<{ nodes: Node[] }>("Accessibility.getFullAXTree");
      return nodes
        .filter(({ role, ignored }) => !ignored && role && roles.includes(role.value))
        .map(({ role, name }) => `${role?.value}: ${name?.value ?? ""}`);
    }
    const all = [
      "textbox",
      "button",
      "checkbox",
      "link",
      "log",
      "list",
      "complementary",
      "dialog",
      "alert",
      "status",
    ];

    expect(await page.evaluate("document.documentElement.lang")).toBe("en");
    await page.fill("name", "alice");
    await page.press("Enter");
    await page.until(`$("password").checkVisibility()`);
    const atTheDoor = await controls("textbox", "button", "alert");
    expect(atTheDoor.toSorted()).toEqual([
      "alert: ",
      "button: Enter the room",
      "textbox: Password for this name",
      "textbox: Your name",
    ]);
    await page.enter("carol");
    await page.has("count", "2 people here");
    bob.send("one\ntwo\n");
    await page.sees("[bob] two");
    const controlsOfRoom = await controls(...all);
    expect(
      controlsOfRoom.filter((control) => /^(?!alert|status|list)\w+: $/.test(control)),
    ).toEqual([]);
    expect(controlsOfRoom).toEqual(
      expect.arrayContaining(["log: Messages", "textbox: Message", "button: Send"]),
    );
    expect(
      await page.evaluate(`[$("log").role, $("status").role, $("lines").parentElement.role]`),
    ).toEqual(["log", "status", "log"]);
    const rows = await page.rows();
    expect(rows.filter(({ name }) => name === "bob")).toHaveLength(2); // though it is seen once only
    await page.say("/register");
    await page.until(`$("secret").open`);
    const inDialog = await controls("textbox", "dialog", "button");
    expect(inDialog).toEqual(
      expect.arrayContaining(["textbox: New password", "textbox: Once more"]),
    );
    expect(inDialog.filter((control) => control.endsWith(": "))).toEqual([]);
  });
});

// --- 20. Faults --------------------------------------------------------------------------------

/** From now on writes of a server fail: those to sockets that `isVictim` picks, or all. */
function breakWrites(peer: Peer, isVictim = (_: unknown) => true): Disposable {
  const sockets = Object.getPrototypeOf(peer.socket) as Socket<unknown>;
  const { write } = sockets;
  sockets.write = function (this: Socket<unknown>, ...bytes: [Uint8Array]) {
    if (this.data instanceof Peer || !isVictim(this)) return write.apply(this, bytes);
    throw new Error("on purpose");
  } as typeof write;
  return { [Symbol.dispose]: () => void (sockets.write = write) };
}

describe.each([["without TLS", open] as const, BY_WEBSOCKET])(
  "an exception, %s,",
  (_, openRoom) => {
    test.each([
      ["open", "New connection", null],
      ["data, while joining", "User mallory has joined", null],
      ["data, while speaking", "Received message", null],
      ["end", "Removing user", "finish"],
      ["close", "Removing user", "terminate"],
    ] as const)("in %s is reported, and costs that connection only", async (_, event, leave) => {
      let isArmed = false;
      const log = (line: string) => {
        if (!isArmed || !line.startsWith(event)) return;
        isArmed = false;
        throw new Error("on purpose");
      };
      const { room, problems } = openLogged({ log }, openRoom);
      const [alice, bob] = await enterAll(room, "alice", "bob");
      isArmed = true;
      const mallory = await Peer.connect(room);
      mallory.send("mallory\nhi\n");
      if (leave) {
        await bob.until("[mallory] hi");
        if (leave === "finish") mallory.finish();
        else mallory.socket.terminate();
      }
      await mallory.ended.promise;
      await stillServes(room, alice, bob);
      expect(problems.splice(0)).toEqual([expect.stringContaining("on purpose")]);
      expect(namesIn(room)).toEqual(["alice", "bob"]);
    });
  },
);

describe("an exception", () => {
  test.each(["handshake", "join", "drain"])("while writing in %s does, too", async (handler) => {
    const { room, problems } = openLogged({}, handler === "handshake" ? openTls : open);
    const [alice, bob, carol] = await enterAll(room, "alice", "bob", "carol");
    const dave = handler === "join" ? await greeted(room) : carol;
    if (handler === "drain") await lagBehind(room, alice, carol, 1);
    {
      using _ = breakWrites(alice);
      if (handler === "join") dave.send("dave\n");
      carol.socket.resume();
      const victim = handler === "handshake" ? await Peer.connect(room) : dave;
      await victim.closed.promise;
    }
    expect(problems.splice(0)).toEqual([expect.stringContaining("on purpose")]);
    if (handler === "join") await enter(room, "dave"); // no ghost has that name
    await stillServes(room, alice, bob);
  });

  test("while a batch is sent costs one client, and everybody else gets every line", async () => {
    const { room, problems } = openLogged();
    const [alice, bob, carol, dave] = await enterAll(room, "alice", "bob", "carol", "dave");
    const victims: unknown[] = [room.clients[1]?.socket, room.clients[2]?.socket];
    {
      using _ = breakWrites(alice, (socket) => victims.includes(socket));
      alice.send(toText(numbered(50)));
      await Promise.all([bob.closed.promise, carol.closed.promise]);
    }
    const heard = await dave.until("* carol has left the chat");
    heard.push(...(await alice.ping()), ...(await dave.ping()));
    expect(heard.filter((line) => line.startsWith("["))).toEqual(numbered(50, "alice"));
    expect(problems.splice(0)).toHaveLength(2);
    expect(namesIn(room)).toEqual(["alice", "dave"]);
  });

  test("while a client that was held back is read costs that client only", async () => {
    jest.useFakeTimers();
    const log = (event: string) => {
      if (event.endsWith(" mallory: line 20")) throw new Error("on purpose");
    };
    const { room, problems } = openLogged({ rate: 10, log });
    const [alice, mallory, bob] = await enterAll(room, "alice", "mallory", "bob");
    mallory.send(toText(numbered(40)));
    await bob.until(`[mallory] line ${NEWCOMER_LINES - 1}`);
    for (let tick = 0; tick < 20; tick++) jest.advanceTimersByTime(100);
    await bob.until(/^\* mallory has left the chat \(\d+ or more lines unread\)$/);
    expect(problems.splice(0)).toHaveLength(1);
    await stillServes(room, alice, bob);
  });
});

describe("a machine that has vanished", () => {
  test("is found within a minute or so, and one that only does not read is not mistaken for it", async () => {
    jest.useFakeTimers();
    const room = open();
    const peers = await enterAll(room, "alice", "bob", "carol", "dave", "erin");
    // [tcpi_retransmits, tcpi_probes, tcpi_last_ack_recv in ms]
    const states: Record<string, [number, number, number]> = {
      alice: [6, 0, 56_000], // is sent the same bytes again and again
      bob: [0, 6, 56_000], // is asked again and again whether he will read on, or is there at all
      carol: [0, 1, 80_000], // has answered that, and still does not read
      dave: [2, 0, 56_000], // has been silent, and now a packet or two to him have been lost
      erin: [6, 0, 54_000], // may come back yet
    };
    const clients = room.clients as unknown as { name: string; socket: { fd: number } }[];
    const names = new Map(clients.map(({ name, socket }) => [socket.fd, name]));
    let looks = 0;
    tcpInfo = (fd, info, result) => {
      looks++;
      expect(result).toBe(0);
      expect(info.getUint8(0)).toBe(1); // tcpi_state: established
      expect(info.getUint32(56, true)).toBeLessThan(30_000); // in truth
      const [retransmits, probes, silence] = states[names.get(fd) ?? ""] ?? [0, 0, 0];
      info.setUint8(2, retransmits);
      info.setUint8(3, probes);
      info.setUint32(56, silence, true);
    };
    cleanups.push(() => (tcpInfo = undefined));
    jest.advanceTimersByTime(60_000);
    for (const peer of peers.slice(2)) await peer.until("* bob has left the chat");
    expect(namesIn(room)).toEqual(["carol", "dave", "erin"]);

    // Those that were found to be there are looked at again, but not each second.
    states["dave"] = [6, 0, 56_000];
    looks = 0;
    jest.advanceTimersByTime(7_000);
    await peers[2].until("* dave has left the chat");
    expect(looks).toBeLessThan(8);
  });

  test("is asked by the kernel whether it is still there", async () => {
    const room = open();
    await enter(room, "alice");
    // A timer of the kind 02, with hundredths of a second, once nothing is on its way any more.
    const port = room.port.toString(16).toUpperCase().padStart(4, "0");
    const timer = RegExp(`: 0100007F:${port} \\S+ 01 \\S+ 02:(\\S+) `);
    const look = () => timer.exec(fs.readFileSync("/proc/net/tcp", "latin1"));
    while (!look()) await turns(1);
    expect(Number(`0x${look()?.[1]}`)).toBeWithin(4000, 4501);
  });
});

describe("registered names", () => {
  /** A trigger by which SQLite refuses a change. */
  const refuse = (change: string) =>
    `CREATE TRIGGER refuse BEFORE ${change} BEGIN SELECT RAISE(ABORT, 'on purpose'); END`;

  const CHANGED = "The registered names cannot be changed: on purpose.";

  test.each([
    ["registered", "INSERT ON accounts", "bob", "/register another horse"],
    ["changed", "UPDATE ON accounts", LOGIN, "/password another horse"],
    ["given up", "DELETE ON accounts", LOGIN, "/unregister"],
  ])("that cannot be %s stay as they are", async (_, change, login, command) => {
    const { room, problems } = openLogged({ db: withAlice(refuse(change)) });
    const peer = await enter(room, login);
    const answer = "* That could not be stored: on purpose.";
    expect(await answersTo(peer, command)).toEqual([answer]);
    expect(problems.splice(0)).toEqual([CHANGED]);
    peer.send("/quit\n");
    await peer.rest();
    await enter(room, "bob");
    await enter(room, LOGIN);
  });

  test("can be changed while the history cannot be stored, of which the file still tells", async () => {
    const db = withAlice(refuse("INSERT ON history"));
    const { room, problems } = openLogged({ db });
    const [alice] = await enterAll(room, LOGIN, "bob");
    fs.utimesSync(db, new Date(), new Date()); // as when SQLite writes to the file
    const changed = ["* The password of alice is changed."];
    expect(await answersTo(alice, "/password correct horse")).toEqual(changed);
    expect(fs.statSync(db).mtimeMs).toBe(0);
    expect(problems.splice(0)).toEqual([
      "The history cannot be stored: on purpose. The chat goes on.",
    ]);
    await enter(room, LOGIN);
  });

  test("are had by their password when a better hash of it cannot be stored", async () => {
    const weak = await Bun.password.hash(PASSWORD, { algorithm: "bcrypt", cost: 4 });
    const change = `UPDATE accounts SET hash = '${weak}'`;
    const file = withAlice(change, refuse("UPDATE ON accounts"));
    const { room, problems } = openLogged({ db: file });
    const alice = await enter(room, LOGIN);
    expect(problems.splice(0)).toEqual([CHANGED]);
    expect(await hashOfAlice(room, file, alice)).toBe(weak);
  });

  test("cost one connection by an exception behind a password, and others still get in", async () => {
    let isArmed = true;
    const log = (event: string) => {
      if (!isArmed || !event.startsWith("User alice has joined")) return;
      isArmed = false;
      throw new Error("on purpose");
    };
    const { room, problems } = openLogged({ db: withAlice(), log });
    const [bob, carol] = await enterAll(room, "bob", "carol");
    const victim = await greeted(room);
    victim.send(`${LOGIN}\n`);
    await victim.closed.promise;
    expect(problems.splice(0)).toEqual([expect.stringContaining("on purpose")]);
    await enter(room, LOGIN);
    await stillServes(room, bob, carol);
  });

  const UNKNOWN = "* The registered names cannot be looked up now. Try again later.";

  test("that cannot be read are nobody's, nor is any other name", async () => {
    const file = withAlice();
    {
      using database = new Database(file);
      const tree = "SELECT rootpage AS page FROM sqlite_schema WHERE name = 'accounts'";
      const { page } = database.query<{ page: number }, []>(tree).get() ?? { page: NaN };
      database.close();
      const bytes = fs.readFileSync(file);
      fs.writeFileSync(file, bytes.fill(0xff, (page - 1) * 4096, page * 4096));
    }
    const { room, problems } = openLogged({ db: file, operators: ["alice"] });
    for (const firstLine of ["alice", LOGIN, "bob"])
      expect(await refusalOf(room, firstLine)).toEqual([UNKNOWN]);
    expect(room.clients).toHaveLength(0);
    const problem = "The registered names cannot be read: it is damaged.";
    expect(problems.splice(0)).toEqual(times(4, () => problem)); // the first one at the start
  });

  test("that cannot be read any more change nothing for those in the room", async () => {
    let isBroken = false;
    const { query } = Database.prototype;
    cleanups.push(() => (Database.prototype.query = query));
    Database.prototype.query = function (this: Database, sql: string) {
      const statement = query.call(this, sql);
      const { get } = statement;
      statement.get = (...given) => {
        if (isBroken && sql.includes("FROM looks")) throw new Error("on purpose");
        return get.apply(statement, given);
      };
      return statement;
    } as typeof query;
    const { room, problems } = openLogged({ db: withAlice(), operators: ["alice"] });
    const [alice, bob] = await enterAll(room, LOGIN, "bob");

    isBroken = true;
    for (const command of ["/nick carol", `/nick ${LOGIN}`, "/register another horse"])
      expect(await answersTo(bob, command)).toEqual([UNKNOWN]);
    expect(await answersTo(alice, "/password another horse")).toEqual([UNKNOWN]);
    alice.send("/kick bob\n");
    expect(await alice.line()).toBe("* Unknown command /kick. Try /help."); // in doubt no operator
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    for (const problem of problems.splice(0))
      expect(problem).toBe("The registered names cannot be read: on purpose.");

    isBroken = false;
    expect(await answersTo(alice, "/kick bob")).toEqual([
      "* bob has left the chat (kicked by alice)",
    ]);
  });
});
