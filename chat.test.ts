/**
 * The promises of server.ts and client.ts, each over real sockets: the server runs in this process
 * on a port of its own, its peers are raw sockets where the rule is about bytes and `client.ts`
 * where it is about people. Nothing here sleeps: a test awaits what must come, and fails by timeout
 * when it does not.
 */

import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  jest,
  mock,
  spyOn,
  test,
} from "bun:test";
import { EventEmitter, once } from "node:events";
import {
  copyFileSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createConnection } from "node:net";
import { tmpdir } from "node:os";
import { dirname } from "node:path";
import { PassThrough, Writable } from "node:stream";
import type { Socket } from "bun";
import type { RoomEvent, ServerOptions } from "./server.ts";

// --- A process that is not one -----------------------------------------------------------------
// Most tests of the programs run them as people do, in processes of their own, where no coverage is
// measured. So a few run `main` here, in a process of straw with a terminal that a test can type in.

class Exit extends Error {
  constructor(readonly code: number) {
    super(`exit ${code}`);
  }
}

function makeStraw() {
  const stdin = Object.assign(new PassThrough(), {
    isTTY: true,
    isRaw: false,
    setRawMode: (on: boolean) => void (stdin.isRaw = on),
  });
  const attempt = (act: () => void) => {
    try {
      act();
    } catch (error) {
      if (!(error instanceof Error) || !error.message.startsWith("exit ")) throw error;
    }
  };
  const terminal = new Writable({
    decodeStrings: false,
    write(chunk, _, done) {
      straw.shown += chunk;
      straw.emit("shown");
      done();
    },
  });
  const stdout = Object.assign(terminal, {
    fd: openSync("/dev/null", "w"),
    isTTY: true,
    columns: 80,
    rows: 24,
    hasColors: () => true,
    end: attempt,
  });
  const { env, report, nextTick, emitWarning, platform, version, versions } = process;
  const straw = Object.assign(new EventEmitter(), {
    ...{ env, report, nextTick, emitWarning, platform, version, versions, stdin, stdout },
    stderr: new PassThrough(),
    exitCode: 0,
    shown: "",
    exited: Promise.withResolvers<number>(),
    running: false,
    exit: (code = straw.exitCode): void => {
      straw.exited.resolve(code);
      if (straw.running) throw new Exit(code); // as nothing comes after an exit
    },
    kill: () => straw.emit("SIGCONT"), // a shell that brings it back to the foreground at once
  });
  return straw;
}

/** What the kernel knows of a connection, where a test cannot wait for a minute until it is true. */
type TcpInfo = (fd: number, info: DataView, result: number) => void;

// The client takes its streams when it is loaded, which is once, however often this file is run.
declare global {
  var strawProcess: ReturnType<typeof makeStraw> | undefined;
  var tcpInfo: TcpInfo | undefined;
}
const straw = (globalThis.strawProcess ??= makeStraw());
const { stdin } = straw;
const real = globalThis.process;
const useStraw = () => void (globalThis.process = straw as unknown as NodeJS.Process);
const useReal = () => void (globalThis.process = real);

const { dlopen } = await import("bun:ffi");
mock.module("bun:ffi", () => ({
  dlopen(...library: Parameters<typeof dlopen>) {
    type Call = (fd: number, level: number, name: number, info: DataView, size: unknown) => number;
    const real = dlopen(...library).symbols["getsockopt"] as unknown as Call;
    const getsockopt: Call = (fd, level, name, info, size) => {
      const result = real(fd, level, name, info, size);
      globalThis.tcpInfo?.(fd, info, result);
      return result;
    };
    return { symbols: { getsockopt } };
  },
}));
const {
  addressKey,
  apply,
  cleanText,
  Room,
  startServer,
  main: serverMain,
} = await import("./server.ts");

useStraw();
const { main: clientMain, PACE, receiveMessages, splitLines } = await import("./client.ts");
useReal();

// --- A room and its peers ----------------------------------------------------------------------

type Server = ReturnType<typeof startServer>;

const servers = new Set<Server>();
const peers = new Set<Peer>();

function open(options: Partial<ServerOptions> = {}): Server {
  const server = startServer({ port: 0, rate: 0, logError: fail, ...options });
  servers.add(server);
  return server;
}

function fail(problem: string): never {
  throw new Error(problem);
}

afterEach(async () => {
  globalThis.tcpInfo = undefined;
  jest.useRealTimers();
  for (const peer of peers) peer.socket.terminate();
  peers.clear();
  await Promise.all(Array.from(servers, (server) => server.stop()));
  servers.clear();
});

/** Where a server is, and for one with TLS whom to trust. */
type Address = { port: number; ca?: string | undefined };

/** A connection of bare bytes, which reads lines and sends whatever it is told to. */
class Peer {
  received = Buffer.alloc(0);
  total = 0; // bytes received
  onlyCounts = false; // what comes is thrown away
  secured = false; // the TLS handshake is done
  ended = Promise.withResolvers<void>(); // a FIN has come
  closed = Promise.withResolvers<Error | undefined>();
  private unsent = Buffer.alloc(0);
  private wake = () => {};
  private wakeSender = () => {};
  private open = true;

  private constructor(readonly socket: Socket<Peer>) {}

  static async connect(server: Address): Promise<Peer> {
    const socket = await Bun.connect<Peer>({
      hostname: "127.0.0.1",
      port: server.port,
      ...(server.ca && { tls: { ca: server.ca } }),
      allowHalfOpen: true,
      socket: {
        open: (socket) => void (socket.data = new Peer(socket)),
        handshake: ({ data: peer }) => {
          peer.secured = true;
          peer.send(""); // only now can anything be sent
        },
        data: ({ data: peer }, chunk) => {
          if (!peer.onlyCounts) peer.received = Buffer.concat([peer.received, chunk]);
          peer.total += chunk.length;
          peer.wake();
        },
        drain: ({ data: peer }) => peer.send(""),
        end: ({ data: peer }) => peer.finish(),
        close: ({ data: peer }, error) => {
          peer.finish();
          peer.closed.resolve(error);
        },
      },
    });
    peers.add(socket.data);
    return socket.data;
  }

  private finish(): void {
    this.open = false;
    this.ended.resolve();
    this.wake();
  }

  send(bytes: string | Uint8Array): void {
    this.unsent = Buffer.concat([this.unsent, Buffer.from(bytes as Uint8Array)]);
    if (this.unsent.length === 0) return;
    this.unsent = this.unsent.subarray(Math.max(0, this.socket.write(this.unsent)));
    if (this.unsent.length === 0) this.wakeSender();
  }

  /** Waits until all is sent that `send` was given. */
  async sent(): Promise<void> {
    while (this.unsent.length > 0 && this.open)
      await new Promise<void>((resolve) => (this.wakeSender = resolve));
  }

  /** The next line, without its newline; null when the connection ends before one is whole. */
  async line(): Promise<string | null> {
    for (;;) {
      const end = this.received.indexOf("\n");
      if (end !== -1) {
        const line = this.received.toString("utf8", 0, end);
        this.received = this.received.subarray(end + 1);
        return line;
      }
      if (!this.open) return null;
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }

  async lines(count: number): Promise<(string | null)[]> {
    const lines = [];
    while (lines.length < count) lines.push(await this.line());
    return lines;
  }

  /** Waits until so many bytes have come; an end before that is a failure. */
  async bytes(total: number): Promise<void> {
    while (this.total < total) {
      if (!this.open) throw new Error(`ended after ${this.total} of ${total} bytes`);
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }

  /** All lines up to the end of the connection. */
  async rest(): Promise<string[]> {
    const lines = [];
    for (let line; (line = await this.line()) !== null;) lines.push(line);
    return lines;
  }

  /** All that has come until `last` does, without it. */
  async until(last: string | RegExp): Promise<string[]> {
    const lines = [];
    for (;;) {
      const line = await this.line();
      if (line === last || (last instanceof RegExp && last.test(line ?? ""))) return lines;
      if (line === null)
        throw new Error(`ended before "${last}", after ${lines.length} lines, ${lines.at(-1)}`);
      lines.push(line);
    }
  }
}

const WELCOME = "Welcome to the chat! What is your name?";

async function greeted(server: Address): Promise<Peer> {
  const peer = await Peer.connect(server);
  expect(await peer.line()).toBe(WELCOME);
  return peer;
}

/** Enters the room; the roster is read. */
async function enter(server: Address, name: string): Promise<Peer> {
  const peer = await greeted(server);
  peer.send(`${name}\n`);
  expect(await peer.line()).toStartWith("* The room contains: ");
  return peer;
}

/** Several enter, one after the other, and have heard of each other. */
async function enterAll(server: Address, ...names: string[]): Promise<Peer[]> {
  const room: Peer[] = [];
  for (const name of names) {
    const peer = await enter(server, name);
    for (const other of room) expect(await other.line()).toBe(`* ${name} has joined the chat`);
    room.push(peer);
  }
  return room;
}

/** Bytes that wait in the server for a client in the room. */
function queued(server: Server, name: string): number {
  return server.clients.find((client) => client.name === name)?.queued ?? NaN;
}

/**
 * Talks until the server holds half a megabyte for a reader who does not read, which is below its
 * limit. Returns all that was said.
 */
async function fillQueue(server: Server, speaker: Peer, reader: string): Promise<string[]> {
  const said: string[] = [];
  const text = "x".repeat(4000);
  while (queued(server, reader) < 500_000) {
    if (said.length > 12_500) throw new Error("the kernel takes more than 50 MB");
    said.push(`${said.length} ${text}`);
    speaker.send(`${said.at(-1)}\n/who\n`);
    await speaker.line();
  }
  return said.map((line) => `[${server.clients[0]?.name}] ${line}`);
}

/** What a newcomer hears instead of the roster. The connection is closed after it. */
async function refusal(server: Address, firstLine: string): Promise<string[]> {
  const peer = await greeted(server);
  peer.send(`${firstLine}\n`);
  return await peer.rest();
}

const NAME_RULE = "* A name is 1 to 32 letters and digits.";
const SCRIPT_RULE = "* A name keeps to letters and digits of one script, with few accents.";

/** What `/who` answers. */
function present(...names: string[]): string {
  return `* ${names.length} ${names.length === 1 ? "person is" : "people are"} here: ${names.join(", ")}`;
}

// --- The server --------------------------------------------------------------------------------

describe("joining", () => {
  test("a newcomer hears the welcome, the roster and then the room; the room hears of them", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const carol = await greeted(server);
    carol.send("carol\n");
    expect(await carol.line()).toBe("* The room contains: alice, bob");
    expect(await alice.line()).toBe("* carol has joined the chat");
    expect(await bob.line()).toBe("* carol has joined the chat");
    alice.send("hello\n");
    expect(await carol.line()).toBe("[alice] hello");
  });

  test("the roster is right after others have come, gone and been renamed", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob", "carol")) as [Peer, Peer];
    const roster = async (name: string) => {
      const peer = await greeted(server);
      peer.send(`${name}\n`);
      return await peer.line();
    };
    expect(await roster("dave")).toBe("* The room contains: alice, bob, carol");
    expect(await roster("erin")).toBe("* The room contains: alice, bob, carol, dave");
    bob.send("/quit\n");
    await alice.until("* bob has left the chat");
    expect(await roster("frank")).toBe("* The room contains: alice, carol, dave, erin");
    alice.send("/nick anna\n");
    await alice.until("* alice is now called anna");
    expect(await roster("grace")).toBe("* The room contains: anna, carol, dave, erin, frank");
    expect(await roster("heidi")).toBe(
      "* The room contains: anna, carol, dave, erin, frank, grace",
    );
  });

  test("the first one is told that the room is empty", async () => {
    const peer = await greeted(open());
    peer.send("alice\n");
    expect(await peer.line()).toBe("* The room contains: ");
  });

  test("who has not given a name hears nothing and is not heard of", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const silent = await greeted(server);
    alice.send("anybody?\n");
    const bob = await enter(server, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
    silent.socket.shutdown();
    expect(await silent.rest()).toEqual([]);
    bob.send("hi\n");
    expect(await alice.line()).toBe("[bob] hi");
  });

  test("name and message in one packet: the room hears both in order, the newcomer neither", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const bob = await greeted(server);
    bob.send("bob\nhello\n/who\n");
    expect(await bob.lines(2)).toEqual(["* The room contains: alice", present("alice", "bob")]);
    expect(await alice.lines(2)).toEqual(["* bob has joined the chat", "[bob] hello"]);
  });

  test("many join in one turn of the event loop: each hears of the later ones only", async () => {
    const server = open();
    const names = Array.from({ length: 20 }, (_, number) => `user${number}`);
    const crowd = await Promise.all(names.map(() => greeted(server)));
    crowd.forEach((peer, number) => peer.send(`${names[number]}\n`));
    const heard = await Promise.all(
      crowd.map(async (peer) => {
        const roster = (await peer.line())?.slice("* The room contains: ".length) ?? "";
        const present = roster === "" ? 0 : roster.split(", ").length;
        return [...roster.split(", "), ...(await peer.lines(names.length - 1 - present))];
      }),
    );
    heard.forEach((lines, number) => {
      const others = lines.map((line) => line?.replace(/^\* (.*) has joined the chat$/, "$1"));
      expect(others.filter((name) => name !== "").toSorted()).toEqual(
        names.filter((name) => name !== names[number]).toSorted(),
      );
    });
    expect(server.clients.map((client) => client.name).toSorted()).toEqual(names.toSorted());
  });
});

describe("names", () => {
  test.each(["", " ", "two words", "dot.ted", "[x]", "*", "a".repeat(33), "bell\u0301!", "-dash"])(
    "%j is refused, the connection closed, and nobody hears of it",
    async (name) => {
      const server = open();
      const alice = await enter(server, "alice");
      expect(await refusal(server, name)).toEqual([NAME_RULE]);
      await enter(server, "bob");
      expect(await alice.line()).toBe("* bob has joined the chat");
    },
  );

  test.each([
    ["a combining mark alone", "\u0301"],
    ["a letter that cannot be seen", "\u3164"],
    ["an invisible joiner", "bo\u034fb"],
    ["a number that falls apart into a fraction", "\u00bd"],
    ["emoji", "😀"],
    ["invalid UTF-8", Buffer.from([0xff, 0xfe])],
  ])("%s is refused", async (_, name) => {
    const peer = await greeted(open());
    peer.send(name);
    peer.send("\n");
    expect(await peer.rest()).toEqual([NAME_RULE]);
  });

  test.each(["a", "7", "a".repeat(32), "Алиса", "小明", "राम", "Zoë", "𝒜lice", "x1"])(
    "%s is welcome",
    async (name) => {
      const server = open();
      await enter(server, name);
      expect(server.clients.map((client) => client.name)).toEqual([name.normalize("NFKC")]);
    },
  );

  test.each([
    ["good", "good"],
    ["STRAẞE", "strasse"],
    ["good", "GOOD"],
    ["good", "ｇｏｏｄ"],
    ["Straße", "STRASSE"],
    ["Zoe\u0308", "ZOË"],
    ["ΟΔΥΣΣΕΥΣ", "οδυσσευς"],
  ])("while %s is here, %s is taken", async (held, wanted) => {
    const server = open();
    await enter(server, held);
    expect(await refusal(server, wanted)).toEqual([
      `* The name ${wanted.normalize("NFKC")} is taken.`,
    ]);
    expect(server.clients).toHaveLength(1);
  });

  test("a name is free at once when its owner leaves, also by reset", async () => {
    const server = open();
    const watcher = await enter(server, "watcher");
    for (const leave of [
      (peer: Peer) => void peer.socket.shutdown(),
      (peer: Peer) => peer.send("/quit\n"),
      (peer: Peer) => peer.socket.terminate(),
    ]) {
      const bob = await enter(server, "bob");
      expect(await watcher.line()).toBe("* bob has joined the chat");
      leave(bob);
      expect(await watcher.line()).toBe("* bob has left the chat");
    }
    await enter(server, "bob");
  });

  test("an HTTP request is turned away, whatever follows it", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const request = "POST / HTTP/1.1\r\nHost: 127.0.0.1:5555\r\n\r\nmallory\nhello from the web\n";
    expect(await refusal(server, request)).toEqual([NAME_RULE]);
    await enter(server, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
  });
});

describe("messages", () => {
  test("go to all but the sender, in one order: 50 messages of each of 5 to 40 clients", async () => {
    const server = open();
    const names = Array.from({ length: 40 }, (_, number) => `user${number}`);
    const crowd = await enterAll(server, ...names);
    const speakers = names.slice(0, 5);
    for (let number = 0; number < 50; number++)
      for (const [place] of speakers.entries()) crowd[place]?.send(`line ${number}\n`);
    const heard = await Promise.all(crowd.slice(5).map((peer) => peer.lines(250)));
    for (const lines of heard) expect(lines).toEqual(heard[0] ?? []);
    for (const [place, speaker] of speakers.entries()) {
      const own = heard[0]?.filter((line) => line?.startsWith(`[${speaker}] `));
      expect(own).toEqual(Array.from({ length: 50 }, (_, number) => `[${speaker}] line ${number}`));
      const others = heard[0]?.filter((line) => !line?.startsWith(`[${speaker}] `));
      expect(await crowd[place]?.lines(200)).toEqual(others);
    }
  });

  test("blank lines are no messages", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("\n\r\n   \n\t\nhello\n");
    expect(await bob.line()).toBe("[alice] hello");
  });

  test("text arrives unharmed: blanks, tabs and every script", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const text =
      "  two  spaces\tand a tab, 漢字, emoji 👩🏽‍🚀, \u05e9\u05dc\u05d5\u05dd, e\u0301 \u0645\u06cc\u200c\u0631\u0648\u0645 ";
    alice.send(`${text}\r\n`);
    expect(await bob.line()).toBe(`[alice] ${text}`);
  });

  test("controls, line separators and direction overrides are taken out", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    let controls = "";
    for (let code = 0; code < 0xa0; code++)
      if ((code < 0x20 || code >= 0x7f) && code !== 9 && code !== 10)
        controls += String.fromCharCode(code);
    alice.send(`a${controls}\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069b\n`);
    expect(await bob.line()).toBe("[alice] ab");
    alice.send("\u001b\u0007\u202e\n\u001b[2Jcleared?\n");
    expect(await bob.line()).toBe("[alice] [2Jcleared?");
  });

  test("invalid UTF-8 becomes U+FFFD and harms nobody", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(Buffer.from([0x61, 0xff, 0x62, 0xe2, 0x82, 0x0a, 0x63, 0x0a]));
    expect(await bob.lines(2)).toEqual(["[alice] a\ufffdb\ufffd", "[alice] c"]);
  });

  test("nobody can speak as somebody else or as the server", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("* carol has joined the chat\r[carol] hi\n\u2028* hm\n");
    expect(await bob.lines(2)).toEqual([
      "[alice] * carol has joined the chat[carol] hi",
      "[alice] * hm",
    ]);
  });
});

describe("framing", () => {
  test("a line byte by byte, its characters split", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    for (const byte of Buffer.from("héllo 漢 👍\r\n")) {
      alice.send(Buffer.from([byte]));
      // A round trip between two bytes, so that they come in packets of their own.
      bob.send("/who\n");
      const heard = await bob.until(present("alice", "bob"));
      expect(heard).toEqual(byte === 10 ? ["[alice] héllo 漢 👍"] : []);
    }
  });

  test("many lines in a packet, and a packet that ends in the middle of a line", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("one\ntwo\nthr");
    expect(await bob.lines(2)).toEqual(["[alice] one", "[alice] two"]);
    alice.send("ee\nfour\n");
    expect(await bob.lines(2)).toEqual(["[alice] three", "[alice] four"]);
  });

  test("what stands behind the last newline was never a message", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("whole\nhalf");
    alice.socket.shutdown();
    expect(await bob.lines(2)).toEqual(["[alice] whole", "* alice has left the chat"]);
  });

  test.each([
    ["\n", 4096],
    ["\r\n", 4096],
  ])("a line of 4096 bytes before %j goes through, one more does not", async (ending, limit) => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(`${"a".repeat(limit)}${ending}${"b".repeat(limit + 1)}${ending}short${ending}`);
    expect(await bob.lines(2)).toEqual([`[alice] ${"a".repeat(limit)}`, "[alice] short"]);
    expect(await alice.line()).toBe("* Your message was longer than 4096 bytes and was not sent.");
  });

  test("a line of 3 MB is dropped, its sender told once, and the next line goes through", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("x".repeat(3_000_000));
    alice.send("\nshort\n");
    expect(await bob.line()).toBe("[alice] short");
    expect(await alice.line()).toBe("* Your message was longer than 4096 bytes and was not sent.");
    alice.send("/who\n");
    expect(await alice.line()).toBe(present("alice", "bob"));
  });

  test("a long line whose end comes by itself is not mistaken for a shorter one", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    for (const piece of ["x".repeat(4097), "x".repeat(900), "\r", "\n"]) {
      alice.send(piece);
      bob.send("/who\n");
      expect(await bob.line()).toBe(present("alice", "bob"));
    }
    expect(await alice.line()).toBe("* Your message was longer than 4096 bytes and was not sent.");
    alice.send("short\n");
    expect(await bob.line()).toBe("[alice] short");
  });

  test("any split of any bytes gives the same lines", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const bytes = Buffer.from("plain\r\n\n漢字 👍\n\u001b[1mbold\n" + "y".repeat(5000) + "\nend\n");
    for (let size = 1; size < bytes.length; size = Math.ceil(size * 2.7)) {
      for (let at = 0; at < bytes.length; at += size) {
        alice.send(bytes.subarray(at, at + size));
        if (bytes.length / size > 50) continue;
        bob.send("/nick bob\n");
        expect(await bob.until("* You are called bob already.")).toBeArray();
      }
      alice.send(`size ${size}\n`);
      await bob.until(`[alice] size ${size}`);
    }
    // The same again, with nothing asked in between.
    for (let size = 1; size < bytes.length; size = Math.ceil(size * 2.7)) {
      for (let at = 0; at < bytes.length; at += size) alice.send(bytes.subarray(at, at + size));
      expect(await bob.lines(4)).toEqual([
        "[alice] plain",
        "[alice] 漢字 👍",
        "[alice] [1mbold",
        "[alice] end",
      ]);
    }
  });

  test("a long line with a return at the limit is not mistaken for a shorter one", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("x".repeat(4096) + "\rhidden");
    bob.send("/nick bob\n");
    expect(await bob.line()).toBe("* You are called bob already.");
    alice.send("\n");
    expect(await alice.line()).toBe("* Your message was longer than 4096 bytes and was not sent.");
  });
});

describe("commands", () => {
  test("/help lists them, for the one who asks", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("/help\n");
    const lines = await alice.lines(6);
    for (const [place, usage] of [
      "/help",
      "/who",
      "/nick NAME",
      "/msg NAME TEXT",
      "/quit",
    ].entries())
      expect(lines[place]).toStartWith(`* ${usage} `);
    expect(lines[5]).toStartWith("* //TEXT ");
    alice.send("done\n");
    expect(await bob.line()).toBe("[alice] done");
  });

  test("/who counts and names all who are here, in the order of the alphabet", async () => {
    const server = open();
    const [carol, bob] = (await enterAll(server, "carol", "bob", "Dave", "alice")) as [Peer, Peer];
    bob.socket.shutdown();
    await carol.until("* bob has left the chat");
    carol.send("/WHO\n");
    expect(await carol.line()).toBe(present("alice", "carol", "Dave"));
  });

  test("/who is right after any coming, going and renaming", async () => {
    const server = open();
    const random = randomNumbers(9);
    const names = [
      "Zoë",
      "zoe",
      "Ängström",
      "angel",
      "Ælfric",
      "Ян",
      "李",
      "a1",
      "a10",
      "a2",
      "Bob",
      "éa",
    ];
    const alice = await enter(server, "alice");
    const others = new Map<string, Peer>();
    const [asker, witness] = [await enter(server, "asker"), alice];
    for (let step = 0; step < 120; step++) {
      const name = names[random(names.length)] ?? "";
      const [old = "", peer] = Array.from(others)[random(others.size || 1)] ?? [];
      if (!others.has(name) && step % 3 > 0) {
        others.set(name, await enter(server, name));
      } else if (!others.has(name) && peer) {
        peer.send(`/nick ${name}\n`);
        others.delete(old);
        others.set(name, peer);
        await witness.until(`* ${old} is now called ${name}`);
      } else if (peer) {
        peer.socket.terminate();
        others.delete(old);
        await witness.until(`* ${old} has left the chat`);
      }
      asker.send("/who\n");
      const here = ["alice", "asker", ...others.keys()];
      const key = (name: string) => name.toLowerCase().normalize("NFD");
      await asker.until(present(...here.sort((a, b) => (key(a) < key(b) ? -1 : 1))));
    }
  });

  test("/nick renames, and all hear of it", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("before\n/nick Ａnna\nafter\n");
    expect(await bob.lines(3)).toEqual([
      "[alice] before",
      "* alice is now called Anna",
      "[Anna] after",
    ]);
    expect(await alice.line()).toBe("* alice is now called Anna");
    await enter(server, "alice");
    bob.send("/who\n");
    expect((await bob.lines(2))[1]).toBe(present("alice", "Anna", "bob"));
  });

  test("/nick to a taken, illegal or one's own name; in other case it is allowed", async () => {
    const server = open();
    const [alice] = (await enterAll(server, "alice", "bob")) as [Peer];
    alice.send("/nick BOB\n/nick no!\n/nick\n/nick \n/nick alice\n/nick Alice\n/nick two words\n");
    expect(await alice.lines(7)).toEqual([
      "* The name BOB is taken.",
      NAME_RULE,
      "* Say it like this: /nick NAME",
      "* Say it like this: /nick NAME",
      "* You are called alice already.",
      "* alice is now called Alice",
      NAME_RULE,
    ]);
  });

  test("/msg reaches two and nobody else, in its place among the other lines", async () => {
    const log: string[] = [];
    const server = open({ log: (event) => log.push(event) });
    const [alice, bob, carol] = (await enterAll(server, "alice", "bob", "carol")) as [
      Peer,
      Peer,
      Peer,
    ];
    alice.send("one\n/msg BOB  psst,  you \ntwo\n");
    expect(await bob.lines(3)).toEqual(["[alice] one", "[alice -> bob] psst,  you", "[alice] two"]);
    expect(await carol.lines(2)).toEqual(["[alice] one", "[alice] two"]);
    expect(await alice.line()).toBe("[alice -> bob] psst,  you");
    expect(log.join("\n")).toContain("one");
    expect(log.join("\n")).not.toContain("psst");
  });

  test("/msg to oneself comes once; to nobody, or without text, is explained", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    alice.send("/msg alice note\n/msg nobody hi\n/msg alice\n/msg\n");
    expect(await alice.lines(4)).toEqual([
      "[alice -> alice] note",
      "* Nobody here is called nobody.",
      "* Say it like this: /msg NAME TEXT",
      "* Say it like this: /msg NAME TEXT",
    ]);
  });

  test.each([
    ["bob", "b0b"],
    ["Torn", "Tom"],
    ["Lars", "Iars"],
    ["paypal", "paypaI"],
  ])("/msg %s does not reach %s", async (name, other) => {
    const server = open();
    const [alice, impostor] = (await enterAll(server, "alice", other)) as [Peer, Peer];
    alice.send(`/msg ${name} a secret\nhello\n`);
    expect(await alice.line()).toBe(`* Nobody here is called ${name}.`);
    expect(await impostor.line()).toBe("[alice] hello");
  });

  test.each(["\0", "\u200e", "\ufeff", "\x1b"])(
    "%j before a slash makes a message of it, also when it is taken out",
    async (invisible) => {
      const [alice, bob] = (await enterAll(open(), "alice", "bob")) as [Peer, Peer];
      alice.send(`${invisible}/quit\n${invisible}//\n/${invisible}who\n`);
      expect(await bob.lines(2)).toEqual(["[alice] /quit", "[alice] //"]);
      expect(await alice.line()).toBe(present("alice", "bob"));
    },
  );

  test("// says a line that begins with a slash", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("//etc/passwd\n///\n");
    expect(await bob.lines(2)).toEqual(["[alice] /etc/passwd", "[alice] //"]);
  });

  test.each(["/foo", "/", "/constructor", "/__proto__"])("%s is unknown", async (command) => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(`${command} bar\nstill here\n`);
    expect(await alice.line()).toBe(`* Unknown command ${command}. Try /help.`);
    expect(await bob.line()).toBe("[alice] still here");
  });

  test("/quit gets what was said before, and nothing that it says afterwards is heard", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("/who\n/quit\nghost\n");
    expect(await alice.rest()).toEqual([present("alice", "bob")]);
    expect(await bob.line()).toBe("* alice has left the chat");
    bob.send("/who\n");
    expect(await bob.line()).toBe(present("bob"));
  });
});

describe("leaving", () => {
  test("by FIN: what was sent before is heard, then that they have left", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("bye\n");
    alice.socket.end();
    expect(await bob.lines(2)).toEqual(["[alice] bye", "* alice has left the chat"]);
    expect(server.clients.map((client) => client.name)).toEqual(["bob"]);
  });

  test("by reset", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.socket.terminate();
    expect(await bob.line()).toBe("* alice has left the chat");
  });

  test("half-closed: what is queued still comes, to the last byte", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    bob.socket.pause();
    const said = await fillQueue(server, alice, "bob");
    bob.socket.shutdown();
    expect(await alice.line()).toBe("* bob has left the chat");
    bob.socket.resume();
    expect(await bob.rest()).toEqual(said);
  });

  test("joining and leaving in one packet", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const bob = await Peer.connect(server);
    bob.send("bob\nhi\n");
    bob.socket.shutdown();
    expect(await bob.rest()).toEqual([WELCOME, "* The room contains: alice"]);
    expect(await alice.lines(3)).toEqual([
      "* bob has joined the chat",
      "[bob] hi",
      "* bob has left the chat",
    ]);
  });

  test("half of a crowd at once: the others lose no line and hear of each", async () => {
    const server = open();
    const names = Array.from({ length: 30 }, (_, number) => `user${number}`);
    const crowd = await enterAll(server, ...names);
    const [leavers, stayers] = [crowd.filter((_, i) => i % 2), crowd.filter((_, i) => i % 2 === 0)];
    for (const [number, peer] of leavers.entries()) {
      stayers[0]?.send(`line ${number}\n`);
      peer.socket.terminate();
    }
    for (const peer of stayers.slice(1)) {
      const lines = await peer.lines(30);
      expect(lines.filter((line) => line?.startsWith("[user0] "))).toEqual(
        leavers.map((_, number) => `[user0] line ${number}`),
      );
      expect(lines.filter((line) => line?.endsWith(" has left the chat")).toSorted()).toEqual(
        names
          .filter((_, i) => i % 2)
          .map((name) => `* ${name} has left the chat`)
          .toSorted(),
      );
    }
    expect(server.clients).toHaveLength(15);
  });

  test("who is let go late still has a minute to read what is left", async () => {
    jest.useFakeTimers();
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    jest.advanceTimersByTime(59_500);
    bob.send("/quit\n");
    expect(await alice.line()).toBe("* bob has left the chat");
    await bob.ended.promise;
    let closed = false;
    void bob.closed.promise.then(() => (closed = true));
    jest.advanceTimersByTime(10_000);
    await enter(server, "carol");
    expect(closed).toBe(false);
  });
});

describe("a reader that does not read", () => {
  /** Talks until so many have left the room; returns what a witness has heard. */
  async function talkUntilGone(gone: number, speaker: Peer, witness: Peer) {
    const text = "x".repeat(4000);
    const heard: string[] = [];
    // The kernel keeps some megabytes for each, the server one more; after 50 MB it must be over.
    for (let sent = 0; sent < 12_500; sent++) {
      speaker.send(`${sent} ${text}\n`);
      const line = (await witness.line()) ?? "";
      heard.push(line.slice(0, 60));
      if (line.startsWith("* ") && --gone === 0) return { heard, sent: sent + 1 };
    }
    throw new Error("they are still there");
  }

  test("is dropped, and the others lose nothing", async () => {
    const server = open();
    const [alice, bob, carol] = await enterThree(server);
    carol.socket.pause();
    const { heard, sent } = await talkUntilGone(1, alice, bob);
    expect(heard.pop()).toBe("* carol has left the chat (too slow)");
    expect(heard.map((line) => line.split(" ")[1])).toEqual(heard.map((_, number) => `${number}`));
    alice.send("done\n");
    const rest = await bob.until("[alice] done");
    expect(rest).toHaveLength(sent - heard.length);
    expect(await alice.line()).toBe("* carol has left the chat (too slow)");
    expect(server.clients.map((client) => client.name).toSorted()).toEqual(["alice", "bob"]);
  });

  test("two of them at once: who comes after them in the list loses nothing either", async () => {
    const server = open();
    const room = await enterAll(server, "alice", "carol", "dave", "bob");
    const [alice, carol, dave, bob] = room as [Peer, Peer, Peer, Peer];
    carol.socket.pause();
    dave.socket.pause();
    const { heard, sent } = await talkUntilGone(2, alice, bob);
    alice.send("done\n");
    const lines = [...heard, ...(await bob.until("[alice] done"))];
    expect(lines.filter((line) => line.startsWith("* ")).toSorted()).toEqual([
      "* carol has left the chat (too slow)",
      "* dave has left the chat (too slow)",
    ]);
    expect(lines.filter((line) => line.startsWith("[")).map((line) => line.split(" ")[1])).toEqual(
      Array.from({ length: sent }, (_, number) => `${number}`),
    );
  });

  test("that comes back in time has lost nothing", async () => {
    const server = open();
    const [alice, bob, carol] = await enterThree(server);
    carol.socket.pause();
    const said = await fillQueue(server, alice, "carol");
    carol.socket.resume();
    expect(await carol.lines(said.length)).toEqual(said);
    expect(await bob.lines(said.length)).toEqual(said);
    alice.send("done\n");
    expect(await carol.line()).toBe("[alice] done");
  });

  test("one batch that is larger than the limit costs nobody who has kept up", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "a".repeat(32), "bob")) as [Peer, Peer];
    bob.socket.pause();
    alice.send("x\n".repeat(200_000));
    do {
      alice.send("/who\n");
      expect(await alice.line()).toBe(present("a".repeat(32), "bob"));
    } while (queued(server, "bob") <= 1024 * 1024);
    expect(server.clients).toHaveLength(2);
  });
});

/** Lines that one who has just come in may say at once, at a rate of 10 lines a second. */
const NEWCOMER_LINES = 16;

describe("pacing", () => {
  test("a paste of 250 lines arrives complete and in order, only slower", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(Array.from({ length: 250 }, (_, number) => `line ${number}\n`).join(""));
    // A newcomer has two seconds' worth, less what its coming has cost.
    for (let number = 0; number < NEWCOMER_LINES; number++)
      expect(await bob.line()).toBe(`[alice] line ${number}`);
    for (let second = 0; second < 23; second++) {
      const first = NEWCOMER_LINES + second * 10;
      bob.send("/nick bob\n");
      expect(await bob.line()).toBe("* You are called bob already.");
      for (let tick = 0; tick < 10; tick++) jest.advanceTimersByTime(100);
      expect(await bob.lines(10)).toEqual(
        Array.from({ length: 10 }, (_, number) => `[alice] line ${first + number}`),
      );
    }
    jest.advanceTimersByTime(1000);
    expect(await bob.lines(4)).toEqual(numbered("alice", 250).slice(-4));
    alice.send("after the paste\n");
    jest.advanceTimersByTime(1000);
    expect(await bob.line()).toBe("[alice] after the paste");
  });

  test("who has said nothing for long may not say more than ten seconds' worth at once", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 1 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    jest.advanceTimersByTime(50_000);
    alice.send(Array.from({ length: 15 }, (_, number) => `line ${number}\n`).join(""));
    await bob.until("[alice] line 9");
    bob.send("/nick bob\n");
    expect(await bob.line()).toBe("* You are called bob already.");
  });

  test("who pastes and half-closes is heard to the last line, and leaves then", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(Array.from({ length: 120 }, (_, number) => `line ${number}\n`).join("") + "half");
    alice.socket.shutdown();
    expect(await bob.lines(NEWCOMER_LINES)).not.toContain("* alice has left the chat");
    for (let tick = 0; tick < 110; tick++) {
      jest.advanceTimersByTime(100);
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(await bob.lines(120 - NEWCOMER_LINES + 1)).toEqual([
      ...numbered("alice", 120).slice(NEWCOMER_LINES),
      "* alice has left the chat",
    ]);
  });

  test("nobody waits for one who floods, and his reset loses him the rest", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob, carol] = await enterThree(server);
    alice.send("flood\n".repeat(50_000));
    await bob.lines(NEWCOMER_LINES);
    carol.send("hi\n");
    expect((await bob.lines(1))[0]).toBe("[carol] hi");
    alice.socket.terminate();
    expect(await bob.line()).toMatch(/^\* alice has left the chat \(\d+ or more lines unread\)$/);
  });

  test("a client that is held back is not read from: its flood stays with it", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const line = "x".repeat(400) + "\n";
    let sent = 0;
    const offer = () => {
      for (let taken; sent < 64_000_000; sent += taken)
        if ((taken = alice.socket.write(line.repeat(1000))) <= 0) return;
    };
    offer();
    expect(await bob.lines(NEWCOMER_LINES)).toHaveLength(NEWCOMER_LINES);
    // Time for the server to read all of it, if it did.
    for (let turn = 0; turn < 200; turn++) {
      bob.send("/nick bob\n");
      if (turn < 8) expect(await bob.line()).toBe("* You are called bob already.");
      else await new Promise((resolve) => setImmediate(resolve));
      offer();
    }
    expect(sent).toBeLessThan(32_000_000);
  });

  test.each([
    ["one that never ends its line", ""],
    ["one that has left and goes on sending", "/quit\n"],
  ])("%s is not read from without end", async (_, first) => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(first);
    const megabyte = Buffer.alloc(1_000_000, "x");
    let sent = 0;
    for (let turn = 0; turn < 400 && sent < 200_000_000; turn++) {
      sent += Math.max(0, alice.socket.write(megabyte));
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(sent).toBeLessThan(40_000_000);
    const carol = await enter(server, "carol");
    bob.send("hello\n");
    await carol.until("[bob] hello");
  });

  test("short questions with long answers do not pile up the answers", async () => {
    const server = await serve("--rate", "0", "--quiet");
    const names = Array.from({ length: 300 }, (_, number) => `${number}`.padStart(32, "x"));
    await Promise.all(names.map((name) => enter(server, name)));
    const attacker = await enter(server, "attacker");
    attacker.socket.pause();
    const before = memory(server.process.pid, "VmRSS");
    const witness = await enter(server, "witness");
    attacker.send("/who\n".repeat(50_000));
    for (let line: string | null = ""; !line?.startsWith("* attacker has left");)
      if ((line = await witness.line()) === null) throw new Error("ended too early");
    expect(memory(server.process.pid, "VmHWM") - before).toBeLessThan(64 * 1024);
  });

  test("rate 0 lets 20,000 lines through at once", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const lines = Array.from({ length: 20_000 }, (_, number) => `line ${number}`);
    alice.send(lines.join("\n") + "\n");
    expect(await bob.lines(20_000)).toEqual(lines.map((line) => `[alice] ${line}`));
  });
});

describe("limits", () => {
  test("a full server says so and closes; a place that becomes free is taken", async () => {
    const server = open({ maxClients: 2 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const carol = await Peer.connect(server);
    carol.send("carol\nhello\n");
    expect(await carol.rest()).toEqual(["* The server is full. Try again later."]);
    carol.socket.end();
    bob.socket.end();
    expect(await alice.line()).toBe("* bob has left the chat");
    await enter(server, "dave");
  });

  test("who gives no name within 60 s is let go, and the names of the others stay", async () => {
    jest.useFakeTimers();
    const server = open();
    const alice = await enter(server, "alice");
    const silent = await greeted(server);
    jest.advanceTimersByTime(59_000);
    const late = await greeted(server);
    jest.advanceTimersByTime(2_000);
    expect(await silent.rest()).toEqual(["* You gave no name within a minute."]);
    late.send("bob\n");
    expect(await late.line()).toBe("* The room contains: alice");
    expect(await alice.line()).toBe("* bob has joined the chat");
  });

  test("a stranger who gives no name and does not close loses the place all the same", async () => {
    jest.useFakeTimers();
    const server = open({ maxClients: 1 });
    const stranger = await greeted(server);
    jest.advanceTimersByTime(61_000);
    expect(await stranger.line()).toBe("* You gave no name within a minute.");
    await stranger.ended.promise;
    jest.advanceTimersByTime(6_000);
    await stranger.closed.promise;
    await enter(server, "alice");
  });

  test("who is let go and does not close is cut off", async () => {
    jest.useFakeTimers();
    const server = open();
    const peer = await greeted(server);
    peer.send("no name!\n");
    expect(await peer.line()).toBe(NAME_RULE);
    await peer.ended.promise;
    jest.advanceTimersByTime(61_000);
    // The peer's half of the connection is still open: only a reset can have closed it.
    expect(await peer.closed.promise).toBeInstanceOf(Error);
  });
});

describe("shutdown", () => {
  test("tells everybody, closes, and the port can be taken again at once", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const silent = await greeted(server);
    const stopped = server.stop();
    for (const peer of [alice, bob, silent]) {
      expect(await peer.rest()).toEqual(["* The server is shutting down"]);
      peer.socket.end();
    }
    await stopped;
    await enter(open({ port: server.port }), "alice");
  });

  test("under load: what was sent before arrives, everywhere and complete", async () => {
    const server = open();
    const names = Array.from({ length: 50 }, (_, number) => `user${number}`);
    const crowd = await enterAll(server, ...names);
    for (const peer of crowd)
      peer.send(Array.from({ length: 100 }, (_, number) => `line ${number}\n`).join(""));
    const stopped = server.stop();
    const heard = await Promise.all(crowd.map((peer) => peer.rest()));
    for (const lines of heard) {
      expect(lines).toHaveLength(49 * 100 + 1);
      expect(lines.at(-1)).toBe("* The server is shutting down");
    }
    for (const peer of crowd) peer.socket.end();
    await stopped;
  });

  test("a slow reader's queue is sent to its end", async () => {
    const server = open();
    const [alice, bob, carol] = await enterThree(server);
    carol.socket.pause();
    const said = await fillQueue(server, alice, "carol");
    const stopped = server.stop();
    const notice = "* The server is shutting down";
    expect(await bob.rest()).toEqual([...said, notice]);
    carol.socket.resume();
    expect(await carol.rest()).toEqual([...said, notice]);
    for (const peer of [alice, bob, carol]) peer.socket.end();
    await stopped;
  });

  test("tells those whose lines were still held back how many are lost", async () => {
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("flood\n".repeat(500));
    await bob.lines(NEWCOMER_LINES);
    const stopped = server.stop();
    const [late, end] = await alice.rest();
    expect(late).toMatch(/^\* Your last lines came too late: 100 or more\.$/);
    expect(end).toBe("* The server is shutting down");
    for (const peer of [alice, bob]) peer.socket.end();
    await stopped;
  });

  test("who never reads or closes holds nothing up for longer than three seconds", async () => {
    jest.useFakeTimers();
    const server = open();
    const alice = await enter(server, "alice");
    alice.socket.pause();
    let stopped = false;
    const stopping = server.stop().then(() => (stopped = true));
    let waited = 0;
    for (; !stopped && waited < 10_000; waited += 5) {
      jest.advanceTimersByTime(5);
      await null;
    }
    expect(waited).toBeWithin(1_900, 2_100);
    await stopping;
  });

  test("those who never stop sending do not hold it up", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const flood = () => {
      if (alice.socket.write("flood\n".repeat(100)) >= 0) setImmediate(flood);
    };
    flood();
    void alice.ended.promise.then(() => alice.socket.terminate());
    await server.stop();
  });
});

test("several servers in one process share nothing", async () => {
  const [one, other] = [open(), open()];
  const alice = await enter(one, "alice");
  await enter(other, "alice");
  const bob = await enter(one, "bob");
  expect(await alice.line()).toBe("* bob has joined the chat");
  bob.send("hi\n");
  expect(await alice.line()).toBe("[bob] hi");
});

// --- The server as a program -------------------------------------------------------------------

/** A program with pipes for streams, whose output a test awaits. */
class Program {
  output = "";
  problems = "";
  private wake = () => {};
  readonly process;
  readonly exited: Promise<number>;

  constructor(...command: string[]) {
    this.process = Bun.spawn(command, {
      cwd: import.meta.dir,
      stdin: "pipe",
      stdout: "pipe",
      stderr: "pipe",
      env: { ...process.env, TZ: "UTC" },
    });
    const out = this.read(this.process.stdout, (text) => (this.output += text));
    const problems = this.read(this.process.stderr, (text) => (this.problems += text));
    this.exited = Promise.all([this.process.exited, out, problems]).then(([code]) => code);
    programs.add(this);
  }

  private async read(stream: ReadableStream<Uint8Array>, take: (text: string) => void) {
    const decoder = new TextDecoder();
    for await (const chunk of stream) {
      take(decoder.decode(chunk, { stream: true }));
      this.wake();
    }
  }

  /** Waits until the standard output holds something like `pattern`, which it returns. */
  async until(
    pattern: RegExp,
    stream: "output" | "problems" = "output",
  ): Promise<RegExpMatchArray> {
    for (;;) {
      const match = this[stream].match(pattern);
      if (match) return match;
      await new Promise<void>((resolve) => (this.wake = resolve));
    }
  }
}

const programs = new Set<Program>();

afterEach(() => {
  for (const program of programs) program.process.kill("SIGKILL");
  programs.clear();
});

/** Waits until a server listens, wherever that is. */
async function listening(program: Program): Promise<Program & { port: number }> {
  const [, port] = await program.until(/Server is running on 127\.0\.0\.1:(\d+), waiting for/);
  return Object.assign(program, { port: Number(port) });
}

/** `bun server.ts` on a free port. */
const serve = (...options: string[]) =>
  listening(new Program(process.execPath, "server.ts", "--port", "0", ...options));

/** The same by a command of bash. */
const inShell = (command: string) => listening(new Program("bash", "-c", command));

describe("bun server.ts", () => {
  test("logs who comes, what is said and who goes, with the local time", async () => {
    const server = await serve();
    const alex = await enter(server, "Alex");
    alex.send("Hello everyone!\n/nick Sasha\n/msg Sasha a secret\n");
    alex.socket.shutdown();
    await server.until(/Removing user/);
    server.process.kill("SIGTERM");
    expect(await server.exited).toBe(0);
    const lines = server.output.trimEnd().split("\n");
    for (const line of lines) expect(line).toMatch(/^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S/);
    expect(lines.map((line) => line.slice(20).replace(/:\d{4,5}\b/, ":PORT"))).toEqual([
      "Server is running on 127.0.0.1:PORT, waiting for connections...",
      "New connection from 127.0.0.1:PORT",
      "User Alex has joined the chat. From 127.0.0.1:PORT",
      "Received message from Alex: Hello everyone!",
      "User Alex is now called Sasha.",
      "Removing user: Sasha from clients",
      "Server is shutting down",
    ]);
  });

  test("--quiet keeps only start and stop", async () => {
    const server = await serve("--quiet");
    const alex = await enter(server, "Alex");
    alex.send("Hello everyone!\n/who\n");
    await alex.line();
    server.process.kill("SIGINT");
    expect(await alex.rest()).toEqual(["* The server is shutting down"]);
    alex.socket.end();
    expect(await server.exited).toBe(0);
    expect(server.output.trimEnd().split("\n")).toHaveLength(2);
    expect(server.problems).toBe("");
  });

  test("a second signal ends it at once", async () => {
    const server = await serve();
    const alice = await enter(server, "alice");
    alice.socket.pause(); // so that the first signal leaves it waiting
    server.process.kill("SIGTERM");
    await server.until(/Server is shutting down/);
    server.process.kill("SIGTERM");
    expect(await server.exited).toBe(143);
  });

  test("SIGHUP ends a room without TLS in good order", async () => {
    const server = await serve();
    const alice = await enter(server, "alice");
    server.process.kill("SIGHUP");
    expect(await alice.rest()).toEqual(["* The server is shutting down"]);
    alice.socket.end();
    expect(await server.exited).toBe(0);
    expect(server.output).toContain("Server is shutting down");
  });

  test("options reach the room", async () => {
    const server = await serve("--max-clients", "1", "--rate", "0");
    const alice = await enter(server, "alice");
    const bob = await Peer.connect(server);
    expect(await bob.rest()).toEqual(["* The server is full. Try again later."]);
    alice.send("/who\n".repeat(500));
    expect(await alice.lines(500)).toHaveLength(500);
  });

  test.each([
    [["--port", "banana"], 2, /^--port takes a number from 0 to 65535, not "banana"/],
    [["--port", "65536"], 2, /^--port takes a number/],
    [["--port"], 2, /^Option '--port <value>' argument missing/],
    [["--rate", "-1"], 2, /^Option '--rate' argument is missing, or begins with -\./],
    [["--max-clients", "0"], 2, /^--max-clients takes a number from 1/],
    [["--foo"], 2, /^Unknown option '--foo'/],
    [["foo"], 2, /^Unexpected argument 'foo'/],
    [["--host", "192.0.2.1"], 1, /^This machine has no such address/],
    [["--host", "no.such.host.invalid"], 1, /^This machine has no such address/],
  ])("%j: one clear line, exit code %d", async (options, code, reason) => {
    const program = new Program(process.execPath, "server.ts", ...options);
    expect(await program.exited).toBe(code);
    expect(program.problems).toMatch(reason);
    expect(program.problems.trimEnd().split("\n")).toHaveLength(1);
    expect(program.output).toBe("");
  });

  test("a port in use: one clear line, exit code 1, and the first server goes on", async () => {
    const server = await serve();
    const second = new Program(process.execPath, "server.ts", "--port", `${server.port}`);
    expect(await second.exited).toBe(1);
    expect(second.problems).toBe("The port is in use: choose another one with --port.\n");
    await enter(server, "alice");
  });

  test("runs as ./server.ts; --help and --version say so and exit", async () => {
    const help = new Program("./server.ts", "--help");
    expect(await help.exited).toBe(0);
    for (const option of ["--host", "--port", "--rate", "--max-clients", "--quiet", "--version"])
      expect(help.output).toContain(`  ${option} `);
    const { version } = await Bun.file(`${import.meta.dir}/package.json`).json();
    const program = new Program("./server.ts", "--version");
    expect(await program.exited).toBe(0);
    expect(program.output).toBe(`bun-chat ${version}\n`);
  });
});

// --- Certificates and what the tests below share -------------------------------------------------

type Certificate = { cert: string; key: string; ca: string }; // two files, and the text of the first
const folder = mkdtempSync(`${tmpdir()}/bun-chat-`);
let certificate: Certificate;
let renewed: Certificate;

/** A certificate, self-signed unless told otherwise, made the way that the README tells. */
async function makeCertificate(
  name: string,
  hosts = "DNS:localhost,IP:127.0.0.1",
  signedBy: readonly string[] = [],
): Promise<Certificate> {
  const [cert, key] = [`${folder}/${name}-cert.pem`, `${folder}/${name}-key.pem`];
  const made = Bun.spawn({
    cmd: [
      ...["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
      ...["-nodes", "-days", "2", "-subj", `/CN=${name}`, "-keyout", key, "-out", cert],
      ...["-addext", `subjectAltName=${hosts}`, ...signedBy],
    ],
    stderr: "ignore",
  });
  expect(await made.exited).toBe(0);
  return { cert, key, ca: await Bun.file(cert).text() };
}

beforeAll(async () => {
  [certificate, renewed] = await Promise.all([makeCertificate("first"), makeCertificate("second")]);
});

afterAll(() => rmSync(folder, { recursive: true }));

/** A room with TLS, and what its peers need to trust it. */
function openTls(options: Partial<ServerOptions> = {}): Server & { ca: string } {
  const tls = { cert: Bun.file(certificate.cert), key: Bun.file(certificate.key) };
  return Object.assign(open({ tls, ...options }), { ca: certificate.ca });
}

/** Sends much, as fast as the other side takes it, and waits until all is sent. */
async function sendAll(peer: Peer, chunk: Uint8Array, times = 1): Promise<void> {
  for (let time = 0; time < times; time++) {
    peer.send(chunk);
    await peer.sent();
  }
}

/** What the kernel says about a process, in KiB: VmRSS is its memory now, VmHWM at its highest. */
function memory(pid: number, field: "VmRSS" | "VmHWM"): number {
  const status = readFileSync(`/proc/${pid}/status`, "latin1");
  return Number(status.match(new RegExp(`${field}:\\s+(\\d+) kB`))?.[1] ?? NaN);
}

/** The next line; an end of the connection is a failure. */
async function next(peer: Peer): Promise<string> {
  const line = await peer.line();
  if (line === null) throw new Error("ended too early");
  return line;
}

/** Numbers from 0 up to a limit, the same on every run (mulberry32). */
function randomNumbers(seed: number): (limit: number) => number {
  return (limit) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };
}

async function enterThree(server: Address): Promise<[Peer, Peer, Peer]> {
  return (await enterAll(server, "alice", "bob", "carol")) as [Peer, Peer, Peer];
}

const numbered = (name: string, count: number) =>
  Array.from({ length: count }, (_, number) => `[${name}] line ${number}`);

/** Sees that everything still works for alice, who speaks, and one who listens. */
async function stillServes(server: Address, alice: Peer, listener: Peer): Promise<void> {
  alice.send("still there?\n");
  await listener.until("[alice] still there?");
  const late = await enter(server, "latecomer");
  await listener.until("* latecomer has joined the chat");
  late.socket.end();
  await listener.until("* latecomer has left the chat");
}

describe("TLS", () => {
  test("a chat, a private message, a name that is refused", async () => {
    const server = openTls();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("hello\n/msg bob psst\n");
    expect(await bob.lines(2)).toEqual(["[alice] hello", "[alice -> bob] psst"]);
    expect(await refusal(server, "no name!")).toEqual([NAME_RULE]);
  });

  test("who speaks plainly to it is cut off at once, and the room goes on", async () => {
    const server = openTls();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const plain = await Peer.connect({ port: server.port });
    plain.send("GET / HTTP/1.1\r\n\r\n");
    await plain.ended.promise;
    expect(plain.received.toString("latin1")).not.toContain("Welcome");
    await stillServes(server, alice, bob);
  });

  test("who speaks TLS to a room without it gets no handshake, but an end", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const eager = await Peer.connect({ port: server.port, ca: certificate.ca });
    await eager.ended.promise;
    expect(eager.total).toBe(0);
    await stillServes(server, alice, bob);
  });

  test("the 60 s for the name begin before the handshake, for who never shakes hands, too", async () => {
    jest.useFakeTimers();
    const server = openTls();
    const silent = await Peer.connect({ port: server.port });
    const slow = await greeted(server);
    jest.advanceTimersByTime(61_000);
    expect(await slow.rest()).toEqual(["* You gave no name within a minute."]);
    await silent.ended.promise;
    expect(silent.total).toBe(0);
  });

  test("a full room says so after the handshake", async () => {
    const server = openTls({ maxClients: 1 });
    await enter(server, "alice");
    const bob = await Peer.connect(server);
    expect(await bob.rest()).toEqual(["* The server is full. Try again later."]);
  });

  test.each([
    ["-tls1_2", true],
    ["-tls1_3", true],
    ["-tls1_1", false],
  ])("openssl s_client %s -quiet: chats is %p", async (version, chats) => {
    const server = openTls();
    const alice = await enter(server, "alice");
    const command = ["openssl", "s_client", version, "-cipher", "ALL:@SECLEVEL=0", "-quiet"];
    const client = new Program(...command, "-connect", `127.0.0.1:${server.port}`);
    if (!chats) {
      expect(await client.exited).not.toBe(0);
      expect(client.output).toBe("");
      return;
    }
    await client.until(/Welcome/);
    client.process.stdin.write("bob\nhello\n");
    expect(await alice.lines(2)).toEqual(["* bob has joined the chat", "[bob] hello"]);
    alice.send("hello bob\n");
    await client.until(/^\[alice\] hello bob$/m);
    client.process.kill();
    expect(await alice.line()).toBe("* bob has left the chat");
  });

  test("a certificate is read again for newcomers; nobody in the room notices", async () => {
    const folderCert = `${folder}/current-cert.pem`;
    const folderKey = `${folder}/current-key.pem`;
    copyFileSync(certificate.cert, folderCert);
    copyFileSync(certificate.key, folderKey);
    const server = await serve("--tls-cert", folderCert, "--tls-key", folderKey);
    const { port } = server;
    const [alice, bob] = (await enterAll({ port, ca: certificate.ca }, "alice", "bob")) as Peer[];
    if (!alice || !bob) throw new Error();

    copyFileSync(renewed.cert, folderCert); // the key is still the old one
    server.process.kill("SIGHUP");
    await server.until(/The certificate stays as it was\. The key does not/, "problems");
    const carol = await enter({ port, ca: certificate.ca }, "carol");
    expect(await alice.line()).toBe("* carol has joined the chat");

    copyFileSync(renewed.key, folderKey);
    server.process.kill("SIGHUP");
    await server.until(/The certificate has been read again/);
    await enter({ port, ca: renewed.ca }, "dave");
    const distrustful = await Peer.connect({ port, ca: certificate.ca });
    await distrustful.ended.promise;
    expect(distrustful.total).toBe(0);
    carol.send("all here\n");
    expect(await alice.lines(2)).toEqual(["* dave has joined the chat", "[carol] all here"]);
    expect(await bob.until("[carol] all here")).toHaveLength(2);
  });

  test("a certificate that is renewed while the server stops does not open it again", async () => {
    const server = await serve("--tls-cert", certificate.cert, "--tls-key", certificate.key);
    const { port } = server;
    const alice = await enter({ port, ca: certificate.ca }, "alice");
    server.process.kill("SIGTERM");
    await alice.until("* The server is shutting down");
    server.process.kill("SIGHUP");
    server.process.kill("SIGHUP");
    await expect(Peer.connect({ port })).rejects.toThrow();
    alice.socket.end();
    expect(await server.exited).toBe(0);
    expect(server.output).not.toContain("read again");
  });

  test("start is refused with one clear line, and never without encryption", async () => {
    const { cert, key } = certificate;
    const junk = `${folder}/junk.pem`;
    writeFileSync(junk, "no certificate\n");
    writeFileSync(`${folder}/empty.pem`, "");
    const cases: [options: string[], code: number, line: RegExp][] = [
      [["--tls-cert", cert], 2, /^--tls-cert and --tls-key go together\. See/],
      [["--tls-key", key], 2, /^--tls-cert and --tls-key go together\. See/],
      [["--tls-key", ""], 2, /^--tls-cert and --tls-key go together\. See/],
      [["--tls-cert", "", "--tls-key", ""], 1, /^The certificate or the key is not in PEM/],
      [
        ["--tls-cert", `${folder}/none`, "--tls-key", key],
        1,
        /^The file .*\/none cannot be read\./,
      ],
      [["--tls-cert", cert, "--tls-key", `${folder}/none`], 1, /^The file .*\/none cannot be read/],
      [["--tls-cert", cert, "--tls-key", folder], 1, /not in PEM/],
      [["--tls-cert", cert, "--tls-key", renewed.key], 1, /^The key does not belong to the cert/],
      [["--tls-cert", junk, "--tls-key", key], 1, /^The certificate or the key is not in PEM/],
      [["--tls-cert", cert, "--tls-key", cert], 1, /^The certificate or the key is not in PEM/],
      [["--tls-cert", cert, "--tls-key", `${folder}/empty.pem`], 2, /empty file/],
    ];
    await Promise.all(
      cases.map(async ([options, code, line]) => {
        const program = new Program(process.execPath, "server.ts", "--port", "0", ...options);
        expect([options, await program.exited]).toEqual([options, code]);
        expect(program.problems).toMatch(line);
        expect(program.problems.trimEnd().split("\n")).toHaveLength(1);
        expect(program.output).toBe("");
      }),
    );
  });

  test("20,000 lines at once, in order", async () => {
    const [alice, bob] = (await enterAll(openTls(), "alice", "bob")) as [Peer, Peer];
    const text = Array.from({ length: 20_000 }, (_, number) => `line ${number}\n`).join("");
    alice.send(text);
    expect(await bob.lines(20_000)).toEqual(numbered("alice", 20_000));
  });

  test("a slow reader that comes back in time has lost nothing", async () => {
    const server = openTls();
    const [alice, bob, carol] = await enterThree(server);
    const said = await lagBehind(server, [alice, bob, carol], 500_000);
    carol.socket.resume();
    alice.send("done\n");
    expect(await carol.until("[alice] done")).toEqual(said);
  });

  test("who half-closes still gets what is queued, to the last byte", async () => {
    const server = openTls();
    const [alice, bob, carol] = await enterThree(server);
    const said = await lagBehind(server, [alice, bob, carol], 300_000);
    carol.socket.shutdown();
    carol.socket.resume();
    expect(await carol.rest()).toEqual(said);
    expect(await alice.line()).toBe("* carol has left the chat");
  });

  test("joining, speaking and leaving in one packet", async () => {
    const server = openTls();
    const alice = await enter(server, "alice");
    const bob = await greeted(server);
    bob.send("bob\nhi\n");
    bob.socket.shutdown();
    expect(await bob.rest()).toEqual(["* The room contains: alice"]);
    expect(await alice.lines(3)).toEqual([
      "* bob has joined the chat",
      "[bob] hi",
      "* bob has left the chat",
    ]);
  });

  test("who pastes and half-closes is heard to the last line, and leaves then", async () => {
    jest.useFakeTimers();
    const server = openTls({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const text = Array.from({ length: 120 }, (_, number) => `line ${number}\n`).join("");
    alice.send(text + "half");
    alice.socket.shutdown(); // its notice arrives with the lines, although they are held back
    expect(await bob.lines(NEWCOMER_LINES)).toEqual(numbered("alice", NEWCOMER_LINES));
    bob.send("/who\n");
    expect(await bob.line()).toBe(present("alice", "bob"));
    for (let tick = 0; tick < 110; tick++) {
      jest.advanceTimersByTime(100);
      await new Promise((resolve) => setImmediate(resolve));
    }
    const rest = [...numbered("alice", 120).slice(NEWCOMER_LINES), "* alice has left the chat"];
    expect(await bob.lines(rest.length)).toEqual(rest);
    expect(await alice.rest()).toEqual([]);
  });

  test("shutdown under load: what was sent before arrives, everywhere and complete", async () => {
    const server = openTls();
    const names = Array.from({ length: 30 }, (_, number) => `user${number}`);
    const crowd = await enterAll(server, ...names);
    const text = Array.from({ length: 100 }, (_, number) => `line ${number}\n`).join("");
    for (const peer of crowd) peer.send(text);
    const stopped = server.stop();
    const heard = await Promise.all(crowd.map((peer) => peer.rest()));
    for (const lines of heard) {
      expect(lines).toHaveLength(29 * 100 + 1);
      expect(lines.at(-1)).toBe("* The server is shutting down");
    }
    for (const peer of crowd) peer.socket.end();
    await stopped;
  });
});

/**
 * The third of three stops reading, and the first talks until the server keeps `least` bytes for the
 * third. The second has heard all. Returns the lines that wait for the third.
 */
async function lagBehind(
  server: Server,
  [alice, bob, carol]: [Peer, Peer, Peer],
  least: number,
): Promise<string[]> {
  carol.socket.pause();
  const said: string[] = [];
  while (queued(server, "carol") < least) {
    const text = `${said.length} ${"q".repeat(4000)}`;
    alice.send(`${text}\n`);
    said.push(`[alice] ${text}`);
    expect(await bob.line()).toBe(said.at(-1) ?? "");
  }
  return said;
}

describe.each([
  ["without TLS", open],
  ["with TLS", openTls],
])("a slow reader, %s", (_, open) => {
  test("may lag behind by 3 MB for ten seconds, and not for longer", async () => {
    jest.useFakeTimers();
    const server: Server & { ca?: string } = open();
    const room = await enterThree(server);
    const [alice, bob, carol] = room;
    const said = await lagBehind(server, room, 3_000_000);
    jest.advanceTimersByTime(9_000);
    carol.socket.resume();
    expect(await carol.lines(said.length)).toEqual(said);

    await lagBehind(server, room, 3_000_000);
    jest.advanceTimersByTime(12_000);
    expect(await bob.line()).toBe("* carol has left the chat (too slow)");
    expect(await alice.line()).toBe("* carol has left the chat (too slow)");
    await stillServes(server, alice, bob);
  });

  test("may lag behind by less than 1 MiB for as long as it likes", async () => {
    jest.useFakeTimers();
    const server: Server & { ca?: string } = open();
    const [alice, bob, carol] = await enterThree(server);
    const said = await lagBehind(server, [alice, bob, carol], 900_000);
    jest.advanceTimersByTime(50_000);
    carol.socket.resume();
    expect(await carol.lines(said.length)).toEqual(said);
    await stillServes(server, alice, bob);
  });

  test("is dropped at 8 MiB at once, and the others lose nothing", async () => {
    jest.useFakeTimers();
    const server: Server & { ca?: string } = open();
    const [alice, bob, carol] = await enterThree(server);
    const said = await lagBehind(server, [alice, bob, carol], 8 * 1024 * 1024 - 200_000);
    expect(server.clients).toHaveLength(3);
    const text = "x".repeat(4000);
    const rest = Array.from({ length: 60 }, (_, number) => `[alice] ${number} ${text}`);
    alice.send(rest.map((line) => `${line.slice("[alice] ".length)}\n`).join(""));
    alice.send("done\n");
    const heard = await bob.until("[alice] done");
    if (!heard.includes("* carol has left the chat (too slow)"))
      expect(await bob.line()).toBe("* carol has left the chat (too slow)");
    expect(heard.filter((line) => line.startsWith("["))).toEqual(rest);
    expect(said.length).toBeGreaterThan(2_000);
    expect(server.clients.map(({ name }) => name)).toEqual(["alice", "bob"]);
  });
});

describe.each([
  ["without TLS", open],
  ["with TLS", openTls],
])("at shutdown, %s", (_, open) => {
  test("a queue just below its limit is sent to its end", async () => {
    const server: Server & { ca?: string } = open();
    const [alice, bob, carol] = await enterThree(server);
    const said = await lagBehind(server, [alice, bob, carol], 1024 * 1024 - 4100);
    // Now to the very byte: the notice of the shutdown does not fit any more.
    const room = 1024 * 1024 - queued(server, "carol") - "[alice] \n".length;
    alice.send(`${"z".repeat(room)}\n`);
    said.push(await next(bob));
    expect(queued(server, "carol")).toBe(1024 * 1024);
    const stopped = server.stop();
    expect(await bob.rest()).toEqual(["* The server is shutting down"]);
    carol.socket.resume();
    const lines = await carol.rest();
    expect(lines).toHaveLength(said.length + 1);
    expect(lines).toEqual([...said, "* The server is shutting down"]);
    for (const peer of [alice, bob, carol]) peer.socket.end();
    await stopped;
  });

  test("a flood that is held back does not hold it up", async () => {
    jest.useFakeTimers();
    const server: Server & { ca?: string } = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send("flood\n".repeat(50_000));
    await bob.lines(NEWCOMER_LINES);
    for (const peer of [alice, bob]) void peer.ended.promise.then(() => peer.socket.shutdown());
    let stopped = false;
    const stopping = server.stop().then(() => (stopped = true));
    let waited = 0;
    for (; !stopped && waited < 10_000; waited += 5) {
      jest.advanceTimersByTime(5);
      await new Promise((resolve) => setImmediate(resolve)); // a turn of the event loop
    }
    await stopping;
    // What had been held back was read to the end, else only the deadline of 2 s had closed it.
    expect(waited).toBeLessThan(2_000);
    expect(await bob.rest()).toEqual(["* The server is shutting down"]);
    expect((await alice.rest()).at(-2)).toMatch(
      /^\* Your last lines came too late: \d{3,} or more\.$/,
    );
  });
});

describe("bad input", () => {
  test("random bytes before and after joining from 500 connections, half of them reset", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const random = randomNumbers(1);
    const junk = (size: number) => Buffer.from(Array.from({ length: size }, () => random(256)));
    const strangers = await Promise.all(Array.from({ length: 500 }, () => Peer.connect(server)));
    for (const [number, stranger] of strangers.entries()) {
      if (number % 4 < 2) stranger.send(`stranger${number}\n`);
      stranger.send(junk(random(3000)));
      if (number % 10 === 0) alice.send(`line ${number / 10}\n`);
      if (number % 2 === 0) stranger.socket.terminate();
      else stranger.socket.shutdown();
    }
    alice.send("done\n");
    const heard = await bob.until("[alice] done");
    expect(heard.filter((line) => line.startsWith("[alice] "))).toEqual(numbered("alice", 50));
    await Promise.all(strangers.map((stranger) => stranger.ended.promise));
    for (const stranger of strangers) stranger.socket.terminate();
    for (const name of ["stranger0", "stranger1", "stranger497"]) await enter(server, name);
    await stillServes(server, alice, bob);
  });

  test("any split of any bytes gives the lines that a simple reader gives", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const random = randomNumbers(2);
    for (let round = 0; round < 40; round++) {
      const heard: string[] = [];
      const pieces = Array.from({ length: 8 }, () => [
        Buffer.from(Array.from({ length: random(30) }, () => random(256))),
        Buffer.from(["é", "漢", "👍", "\u202e", " ", "\r", "\r\n", "\n\n", "\t"][random(9)] ?? ""),
        Buffer.from("x".repeat(random(12) === 0 ? 4080 + random(30) : 0)),
        Buffer.from(["\n", "\r\n", "", "\n\ufeff"][random(4)] ?? ""),
      ]).flat();
      // Commands are another matter. The last line is whole, and marks the end of the round.
      const bytes = Buffer.concat([...pieces, Buffer.from(`\nend ${round}\n`)]);
      for (const [at, byte] of bytes.entries()) if (byte === 0x2f) bytes[at] = 0x2e;
      for (let at = 0; at < bytes.length;) {
        const size = 1 + random(random(4) === 0 ? 5 : 2000);
        alice.send(bytes.subarray(at, (at += size)));
        // A round trip between two pieces, so that they come in packets of their own.
        bob.send("/nick bob\n");
        heard.push(...(await bob.until("* You are called bob already.")));
      }
      while (heard.at(-1) !== `[alice] end ${round}`) heard.push(await next(bob));
      expect(heard).toEqual(reference(bytes));
    }
  });

  /** The lines that others see of one named alice: split, decode, clean. */
  function reference(bytes: Buffer): string[] {
    const lines: string[] = [];
    let line: number[] = [];
    for (const byte of bytes) {
      if (byte !== 10) {
        line.push(byte);
        continue;
      }
      if (line.at(-1) === 13) line.pop();
      const text = [...new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(line))]
        .filter(
          (character) =>
            !/[\p{Cc}\u2028-\u202e\u2066-\u2069\ufeff]/u.test(character) || character === "\t",
        )
        .join("");
      if (line.length <= 4096 && text.trim() !== "") lines.push(`[alice] ${text}`);
      line = [];
    }
    return lines;
  }

  test("who does not answer for long is gone, who only does not read is not", async () => {
    jest.useFakeTimers();
    const server = open();
    const names = ["alice", "bob", "carol", "dave", "erin"];
    const peers = await enterAll(server, ...names);
    const fds = (server.clients as unknown as { socket: { fd: number } }[]).map(
      ({ socket }) => socket.fd,
    );
    // As it may be after a minute. [tcpi_retransmits, tcpi_probes, tcpi_last_ack_recv]
    const states = [
      [6, 0, 56_000], // alice is sent the same bytes again and again
      [0, 6, 56_000], // bob is asked again and again whether he will read on, or is there at all
      [0, 1, 80_000], // carol has answered that, and still does not read
      [2, 0, 56_000], // dave has been silent, and now a packet or two to him have been lost
      [6, 0, 54_000], // erin may come back yet
    ];
    globalThis.tcpInfo = (fd, info, result) => {
      expect(result).toBe(0);
      expect(info.getUint8(0)).toBe(1); // tcpi_state: established
      expect(info.getUint32(56, true)).toBeLessThan(30_000); // ms, in truth
      const [retransmits = 0, probes = 0, silence = 0] = states[fds.indexOf(fd)] ?? [];
      info.setUint8(2, retransmits);
      info.setUint8(3, probes);
      info.setUint32(56, silence, true);
    };
    jest.advanceTimersByTime(60_000);
    for (const peer of peers.slice(2))
      expect(await peer.lines(2)).toEqual(["* alice has left the chat", "* bob has left the chat"]);
    expect(server.clients.map(({ name }) => name).sort()).toEqual(["carol", "dave", "erin"]);
  });

  test("who vanishes after others have been found to be there is found, too", async () => {
    jest.useFakeTimers();
    const server = open();
    const [alice] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    jest.advanceTimersByTime(65_000);
    const [, bob] = server.clients as unknown as { socket: { fd: number } }[];
    let looks = 0;
    globalThis.tcpInfo = (fd, info) => {
      looks++;
      info.setUint8(2, fd === bob?.socket.fd ? 6 : 0);
      info.setUint32(56, fd === bob?.socket.fd ? 56_000 : 0, true);
    };
    jest.advanceTimersByTime(7_000);
    expect(await alice.line()).toBe("* bob has left the chat");
    expect(looks).toBeLessThan(5); // it takes time
  });

  test("the kernel asks those who are silent whether they are still there", async () => {
    const server = open();
    await enter(server, "alice");
    const [client] = server.clients as unknown as { socket: { fd: number } }[];
    const { symbols } = dlopen("libc.so.6", {
      getsockopt: { args: ["int", "int", "int", "buffer", "buffer"], returns: "int" },
    });
    const option = (level: number, name: number) => {
      const value = new Uint32Array(1);
      symbols.getsockopt(client?.socket.fd ?? -1, level, name, value, Uint32Array.of(4));
      return value[0];
    };
    const [SOL_SOCKET, SO_KEEPALIVE, IPPROTO_TCP, TCP_KEEPIDLE] = [1, 9, 6, 4];
    expect(option(SOL_SOCKET, SO_KEEPALIVE)).toBe(1);
    expect(option(IPPROTO_TCP, TCP_KEEPIDLE)).toBe(45); // s
  });

  test("200 MB without a newline take no memory, and the line after them is heard", async () => {
    const server = await serve("--rate", "0", "--quiet");
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const megabyte = Buffer.alloc(1_000_000, "x");
    const before = memory(server.process.pid, "VmRSS");
    await sendAll(alice, megabyte, 200);
    alice.send("\nshort\n");
    expect(await bob.line()).toBe("[alice] short");
    expect(memory(server.process.pid, "VmHWM") - before).toBeLessThan(16 * 1024);
    expect(await alice.line()).toBe("* Your message was longer than 4096 bytes and was not sent.");
  });

  test("a name sent twice is a message the second time", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    const bob = await greeted(server);
    bob.send("bob\nbob\n");
    expect(await alice.lines(2)).toEqual(["* bob has joined the chat", "[bob] bob"]);
  });

  test("nothing that a client sends can break or colour a line of the log", async () => {
    const log: string[] = [];
    const server = open({ log: (event) => log.push(event) });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const forged = "2026-01-01 00:00:00 Removing user: bob from clients";
    await refusal(server, `mallory\r${forged}`);
    alice.send(`hi\r${forged}\n\u001b[31mred\u2028${forged}\u0085${forged}\n/nick a\rb\nbye\n`);
    await bob.until("[ab] bye");
    expect(log.filter((event) => /[^\P{C}\t]|[\u2028\u2029]/u.test(event))).toEqual([]);
    expect(log.filter((event) => event.startsWith(forged))).toEqual([]);
    expect(log.slice(-4)).toEqual([
      `Received message from alice: hi${forged}`,
      `Received message from alice: [31mred${forged}${forged}`,
      "User alice is now called ab.",
      "Received message from ab: bye",
    ]);
  });
});

describe("the log", () => {
  /** A room whose log a test reads, each line with its port as PORT. */
  function openLogged(options: Partial<ServerOptions> = {}) {
    const log: string[] = [];
    const add = (event: string) => log.push(event.replace(/:\d{4,5}\b/, ":PORT"));
    const server = options.tls ? openTls({ log: add }) : open({ log: add, ...options });
    return { server, log };
  }

  test.each([
    ["two words", `A name is 1 to 32 letters and digits. It gave "two words"`],
    ["bоb", `A name keeps to letters and digits of one script, with few accents. It gave "bоb"`],
    ["ALICE", `The name ALICE is taken. It gave "ALICE"`],
    ["a1ice", `The name a1ice looks like one that is taken. It gave "a1ice"`],
    [
      '"\u001b[31m\r2026-01-01 Server is shutting down\u2028\u202e\\',
      `A name is 1 to 32 letters and digits. It gave "\\"[31m2026-01-01 Server is shutting down\\\\"`,
    ],
    ["y".repeat(600), `A name is 1 to 32 letters and digits. It gave "${"y".repeat(128)}"`],
  ])("says that and why %j was refused, and that cannot be forged", async (name, reason) => {
    const { server, log } = openLogged();
    await enter(server, "alice");
    await refusal(server, name);
    expect(log.slice(2)).toEqual([
      "New connection from 127.0.0.1:PORT",
      `Refused 127.0.0.1:PORT: ${reason}`,
    ]);
  });

  test("says who found no place", async () => {
    const { server, log } = openLogged({ maxClients: 1 });
    await enter(server, "alice");
    await (await Peer.connect(server)).rest();
    expect(log.at(-1)).toBe("Refused 127.0.0.1:PORT: The server is full. Try again later.");
    const other = openLogged({ maxPerAddress: 1 });
    await enter(other.server, "alice");
    await (await Peer.connect(other.server)).rest();
    expect(other.log.at(-1)).toBe(
      "Refused 127.0.0.1:PORT: Too many connections from your address.",
    );
  });

  test("says who gave no name in time, and tells one whose name had no end", async () => {
    jest.useFakeTimers();
    const { server, log } = openLogged();
    const silent = await greeted(server);
    const endless = await greeted(server);
    endless.send("alice");
    await (await greeted(server)).socket.terminate();
    await enter(server, "bob");
    jest.advanceTimersByTime(61_000);
    expect(await silent.rest()).toEqual(["* You gave no name within a minute."]);
    expect(await endless.rest()).toEqual([
      "* Your name did not end with a newline within a minute.",
    ]);
    expect(log.slice(-2)).toEqual([
      "Refused 127.0.0.1:PORT: You gave no name within a minute.",
      "Refused 127.0.0.1:PORT: Your name did not end with a newline within a minute.",
    ]);
  });

  test("says whose TLS handshake failed, or did not come", async () => {
    jest.useFakeTimers();
    const { server, log } = openLogged({ tls: {} });
    const plain = await Peer.connect({ port: server.port });
    plain.send("GET / HTTP/1.1\r\n\r\n");
    await plain.ended.promise;
    expect(log.at(-1)).toBe("Refused 127.0.0.1:PORT: the TLS handshake failed");
    const silent = await Peer.connect({ port: server.port });
    await enter(server, "alice");
    jest.advanceTimersByTime(61_000);
    await silent.ended.promise;
    expect(log.at(-1)).toBe(
      "Refused 127.0.0.1:PORT: it did not finish the TLS handshake within a minute",
    );
  });
});

describe("faults", () => {
  test("a reader that stops again and again, and reads a part each time, loses nothing", async () => {
    const server = open();
    const [alice, bob, carol] = await enterThree(server);
    const said: string[] = [];
    const heard: (string | null)[] = [];
    for (let round = 0; round < 5; round++) {
      said.push(...(await lagBehind(server, [alice, bob, carol], 600_000)));
      carol.socket.resume();
      while (heard.length < said.length - 200) heard.push(await carol.line());
    }
    while (heard.length < said.length) heard.push(await carol.line());
    expect(heard).toEqual(said);
    expect(server.clients).toHaveLength(3);
  });

  test("2,000 silent connections hold up nobody, and are gone after 60 s", async () => {
    jest.useFakeTimers();
    const server = open({ maxClients: 2_002 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const silent: Peer[] = [];
    // Not all at once: the kernel lets no more than 512 wait to be accepted.
    while (silent.length < 2_000)
      silent.push(...(await Promise.all(Array.from({ length: 200 }, () => greeted(server)))));
    const carol = await Peer.connect(server);
    expect(await carol.rest()).toEqual(["* The server is full. Try again later."]);
    carol.socket.terminate();
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    jest.advanceTimersByTime(61_000);
    for (const peer of silent) {
      expect(await peer.rest()).toEqual(["* You gave no name within a minute."]);
      peer.socket.end();
    }
    await Promise.all(silent.map((peer) => peer.closed.promise));
    await stillServes(server, alice, bob);
  });

  test("3,000 connections that come and go leave nothing behind", async () => {
    // Were one forgotten, there would soon be no place for the next: 60 come at a time.
    const limits = ["--max-clients", "62", "--max-per-address", "62", "--rate", "0"];
    const server = await serve(...limits, "--quiet");
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const comeAndGo = async (place: number) => {
      const peer = await greeted(server);
      if (place % 3 > 0) peer.send(`guest${place}\n`);
      if (place % 3 > 0) await peer.line();
      if (place % 2 > 0) peer.socket.terminate();
      else peer.send(place % 3 > 0 ? "/quit\n" : "\n");
      await peer.ended.promise;
      peer.socket.terminate();
      peers.delete(peer);
    };
    const wave = async (waves: number) => {
      for (let number = 0; number < waves; number++) {
        await Promise.all(Array.from({ length: 60 }, (_, place) => comeAndGo(place)));
        alice.send(`wave ${number}\n`);
        const heard = await bob.until(`[alice] wave ${number}`);
        expect(heard.filter((line) => line.endsWith(" has joined the chat"))).toHaveLength(40);
        let left = heard.filter((line) => line.endsWith(" has left the chat")).length;
        while (left < 40) if ((await next(bob)).endsWith(" has left the chat")) left++;
      }
    };
    await wave(20);
    const before = memory(server.process.pid, "VmRSS");
    await wave(30);
    expect(memory(server.process.pid, "VmRSS") - before).toBeLessThan(8 * 1024);
    await stillServes(server, alice, bob);
  });

  test("without enough file descriptors it serves fewer, says so, and never runs out", async () => {
    const command = `ulimit -n 128; exec ${process.execPath} server.ts --port 0`;
    const server = await inShell(command);
    await server.until(/At most 64 clients: more would need more open files \(ulimit -n\)\./);
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const crowd = await Promise.all(Array.from({ length: 300 }, () => Peer.connect(server)));
    const first = await Promise.all(crowd.map((peer) => peer.line()));
    expect(first.filter((line) => line === WELCOME)).toHaveLength(62);
    const told = first.filter((line) => line === "* The server is full. Try again later.");
    expect(told.length).toBeGreaterThanOrEqual(30);
    // With none left the server would spin: `accept` fails, and the connection stays.
    expect(readdirSync(`/proc/${server.process.pid}/fd`).length).toBeLessThan(128);
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");
    for (const peer of crowd) peer.socket.terminate();
    let attempts = 0;
    for (let greeting: string | null = null; greeting !== WELCOME; attempts++) {
      const late = await Peer.connect(server);
      greeting = await late.line();
      late.socket.terminate();
      if (attempts > 1000) throw new Error("no place becomes free");
    }
    await stillServes(server, alice, bob);
  });

  test.each([
    ["open", "New connection", null],
    ["data, while joining", "User mallory has joined", null],
    ["data, while speaking", "Received message", null],
    ["end", "Removing user", "shutdown"],
    ["close", "Removing user", "terminate"],
  ] as const)("an exception in %s is reported and costs that connection only", async (...row) => {
    const [, event, leave] = row;
    const reported = Promise.withResolvers<string>();
    let armed = false;
    const server = open({
      log: (line) => {
        if (!armed || !line.startsWith(event)) return;
        armed = false;
        throw new Error("on purpose");
      },
      logError: reported.resolve,
    });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    armed = true;
    const mallory = await Peer.connect(server);
    mallory.send("mallory\nhi\n");
    if (leave) {
      await bob.until("[mallory] hi");
      mallory.socket[leave]();
    }
    expect(await reported.promise).toContain("on purpose");
    await mallory.ended.promise;
    await stillServes(server, alice, bob);
    expect(server.clients.map((client) => client.name).toSorted()).toEqual(["alice", "bob"]);
  });

  test.each(["handshake", "drain"])("and so does one in %s", async (handler) => {
    const problems: string[] = [];
    const server = openTls({ logError: (problem) => problems.push(problem) });
    const [alice, bob, carol] = await enterThree(server);
    if (handler === "drain") await lagBehind(server, [alice, bob, carol], 1);
    // What both handlers do is to write; here the next write of the server fails.
    const sockets = Object.getPrototypeOf(alice.socket) as Socket<unknown>;
    const { write } = sockets;
    sockets.write = function (this: Socket<unknown>, ...bytes: [Uint8Array]) {
      if (this.data instanceof Peer) return write.apply(this, bytes);
      sockets.write = write;
      throw new Error("on purpose");
    } as typeof write;
    const victim = handler === "drain" ? carol : await Peer.connect(server);
    victim.socket.resume();
    await victim.closed.promise;
    expect(problems).toHaveLength(1);
    expect(problems[0]).toContain("on purpose");
    if (handler === "drain") expect(await bob.line()).toBe("* carol has left the chat");
    await stillServes(server, alice, bob);
  });

  test("an exception while a batch is sent costs one client, and everybody else gets every line", async () => {
    const problems: string[] = [];
    const server = open({ logError: (problem) => problems.push(problem) });
    const room = await enterAll(server, "alice", "bob", "carol", "dave", "erin");
    const [alice, bob, carol, dave, erin] = room as [Peer, Peer, Peer, Peer, Peer];
    const victims = [server.clients[1]?.socket, server.clients[3]?.socket] as unknown[];
    const sockets = Object.getPrototypeOf(alice.socket) as Socket<unknown>;
    const { write } = sockets;
    sockets.write = function (this: Socket<unknown>, ...bytes: [Uint8Array]) {
      if (victims.includes(this)) throw new Error("on purpose");
      return write.apply(this, bytes);
    } as typeof write;
    try {
      for (let number = 0; number < 50; number++) alice.send(`line ${number}\n`);
      await Promise.all([bob.closed.promise, dave.closed.promise]);
    } finally {
      sockets.write = write;
    }
    alice.send("done\n");
    for (const peer of [carol, erin]) {
      const heard = await peer.until("[alice] done");
      expect(heard.filter((line) => line.startsWith("["))).toEqual(numbered("alice", 50));
      expect(heard.filter((line) => line.startsWith("*"))).toEqual([
        "* bob has left the chat",
        "* dave has left the chat",
      ]);
    }
    expect(problems).toHaveLength(2);
    await stillServes(server, alice, carol);
  });

  test("an exception while a client is read from later costs that client only", async () => {
    jest.useFakeTimers();
    const problems: string[] = [];
    const server = open({
      rate: 10,
      log: (event) => {
        if (event.endsWith(" mallory: line 20")) throw new Error("on purpose");
      },
      logError: (problem) => problems.push(problem),
    });
    const [alice, mallory, bob] = (await enterAll(server, "alice", "mallory", "bob")) as Peer[];
    if (!alice || !mallory || !bob) throw new Error();
    mallory.send(Array.from({ length: 40 }, (_, number) => `line ${number}\n`).join(""));
    await bob.until(`[mallory] line ${NEWCOMER_LINES - 1}`);
    for (let tick = 0; tick < 20; tick++) jest.advanceTimersByTime(100);
    await bob.until(/^\* mallory has left the chat \(\d+ or more lines unread\)$/);
    expect(problems).toHaveLength(1);
    await stillServes(server, alice, bob);
  });

  test("an exception while somebody joins leaves no ghost with the name", async () => {
    const problems: string[] = [];
    const server = open({ logError: (problem) => problems.push(problem) });
    const alice = await enter(server, "alice");
    const sockets = Object.getPrototypeOf(alice.socket) as Socket<unknown>;
    const { write } = sockets;
    const bob = await greeted(server);
    sockets.write = function (this: Socket<unknown>, ...bytes: [Uint8Array]) {
      if (!(this.data instanceof Peer)) throw new Error("on purpose");
      return write.apply(this, bytes);
    } as typeof write;
    try {
      bob.send("bob\n");
      await bob.closed.promise;
    } finally {
      sockets.write = write;
    }
    expect(problems[0]).toContain("on purpose");
    await enter(server, "bob");
    alice.send("/who\n");
    await alice.until(present("alice", "bob"));
  });

  test("clients that half-close and are reset at once leave nothing in memory", async () => {
    const server = open();
    const alice = await enter(server, "alice");
    for (let round = 0; round < 10; round++) {
      const names = Array.from({ length: 50 }, (_, number) => `user${round}x${number}`);
      const crowd = await Promise.all(names.map((name) => enter(server, name)));
      for (const peer of crowd) peer.send("hello\nhalf a line");
      for (const peer of crowd) peer.socket.shutdown();
      for (const peer of crowd) peer.socket.terminate();
      for (const _ of crowd) await alice.until(/ has left the chat/);
    }
    alice.send("/who\n");
    await alice.until(present("alice"));
    expect(server.memoryUsed).toBe(0);
  });

  test("2,000 who leave at once, each with a last line, are all heard and all get the end", async () => {
    const server = open();
    const witness = await enter(server, "witness");
    const leavers: Peer[] = [];
    while (leavers.length < 2_000) {
      const names = Array.from({ length: 200 }, (_, number) => `user${leavers.length + number}`);
      leavers.push(...(await Promise.all(names.map((name) => enter(server, name)))));
    }
    for (const peer of leavers) peer.onlyCounts = true;
    for (const peer of leavers) {
      peer.send("bye\n");
      peer.socket.shutdown();
    }
    await Promise.all(leavers.map((peer) => peer.ended.promise));
    witness.send("/who\n");
    const heard = await witness.until(present("witness"));
    for (const suffix of ["] bye", " has joined the chat", " has left the chat"])
      expect(heard.filter((line) => line.endsWith(suffix))).toHaveLength(2_000);
  });

  test("standard output that is closed stops nothing", async () => {
    const server = await inShell(
      `exec ${process.execPath} server.ts --port 0 --rate 0 > >(head -n 1)`,
    );
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(Array.from({ length: 5_000 }, (_, number) => `line ${number}\n`).join(""));
    expect(await bob.lines(5_000)).toEqual(numbered("alice", 5_000));
    await stillServes(server, alice, bob);
    server.process.kill("SIGTERM");
    expect(await alice.until("* The server is shutting down")).toBeArray();
    for (const peer of [alice, bob]) peer.socket.end();
    expect(await server.exited).toBe(0);
    expect(server.problems).toBe("");
  });

  test("standard output that nobody reads stops nothing, takes little memory, and is told", async () => {
    // The reader takes the first line, and the rest after a line on its own input.
    const reader = "(head -n 1; read -r -u 3; exec cat)";
    const server = await inShell(
      `exec 3<&0; exec ${process.execPath} server.ts --port 0 --rate 0 > >${reader}`,
    );
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const text = `${"t".repeat(4000)}\n`.repeat(25);
    const talk = async (times: number) => {
      for (let time = 0; time < times; time++) {
        alice.send(text);
        await bob.lines(25);
      }
    };
    await talk(50);
    const before = memory(server.process.pid, "VmRSS");
    await talk(500);
    expect(memory(server.process.pid, "VmRSS") - before).toBeLessThan(24 * 1024);
    server.process.stdin.write("\n");
    // Only what is said after the reader has caught up is printed, so it is said until it is seen.
    while (!/\(\d+ lines are missing here: nobody read them in time\)/.test(server.output)) {
      alice.send("again\n");
      await next(bob);
    }
    server.process.stdin.end();
    await stillServes(server, alice, bob);
  });

  test("SIGTERM with nobody reading its output ends it all the same", async () => {
    const reader = "(head -n 1; read -r -u 3)";
    const server = await inShell(
      `exec 3<&0; exec ${process.execPath} server.ts --port 0 --rate 0 > >${reader}`,
    );
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(`${"t".repeat(4000)}\n`.repeat(1_000));
    await bob.lines(1_000);
    server.process.kill("SIGTERM");
    for (const peer of [alice, bob]) {
      await peer.rest();
      peer.socket.end();
    }
    expect(await server.process.exited).toBe(0);
    server.process.stdin.end();
  });

  test("SIGTERM with 1,000 clients: all that was sent before arrives, and the exit code is 0", async () => {
    const server = await serve("--rate", "0", "--quiet");
    const names = Array.from({ length: 1_000 }, (_, number) => `user${number}`);
    const crowd = await Promise.all(names.map((name) => enter(server, name)));
    const all = await enter(server, "last");
    for (const peer of crowd) await peer.until("* last has joined the chat");
    for (const peer of crowd.slice(0, 50)) peer.send(numbered("", 5).join("\n") + "\n");
    server.process.kill("SIGTERM");
    const heard = await Promise.all(crowd.map((peer) => peer.rest()));
    expect(await all.rest()).toHaveLength(251);
    for (const [place, lines] of heard.entries()) {
      expect(lines).toHaveLength((place < 50 ? 245 : 250) + 1);
      expect(lines.at(-1)).toBe("* The server is shutting down");
    }
    for (const peer of [...crowd, all]) peer.socket.end();
    expect(await server.exited).toBe(0);
  });

  test("SIGKILL, and a new start on the same port at once", async () => {
    const first = await serve();
    const alice = await enter(first, "alice");
    first.process.kill("SIGKILL");
    await alice.ended.promise;
    await first.exited;
    const second = await serve("--port", `${first.port}`);
    expect(second.port).toBe(first.port);
    await enter(second, "alice");
  });

  test("connections that are reset before they are accepted are no error", async () => {
    const server = await serve("--rate", "0");
    const alice = await enter(server, "alice");
    server.process.kill("SIGSTOP");
    const sockets = Array.from({ length: 20 }, () => createConnection(server.port, "127.0.0.1"));
    await Promise.all(sockets.map((socket) => once(socket, "connect")));
    for (const socket of sockets) socket.resetAndDestroy();
    server.process.kill("SIGCONT");
    alice.send("/who\n");
    expect(await alice.line()).toBe(present("alice"));
    server.process.kill("SIGTERM");
    await alice.rest();
    alice.socket.end();
    expect(await server.exited).toBe(0);
    expect(server.problems).toBe("");
  });

  test("an exception that nobody can explain ends the room in good order, with exit code 1", async () => {
    const fail = 'setTimeout(() => { throw new Error("on purpose") })';
    const code = `process.on("SIGUSR2", () => ${fail}); (await import("./server.ts")).main();`;
    const program = new Program(process.execPath, "-e", code, "--", "--port", "0", "--rate", "0");
    const server = await listening(program);
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(`${numbered("", 1000).join("\n")}\n`);
    server.process.kill("SIGUSR2");
    const heard = await bob.rest();
    expect(heard).toHaveLength(1001);
    expect(heard.at(-1)).toBe("* The server is shutting down");
    expect(await alice.rest()).toEqual(["* The server is shutting down"]);
    for (const peer of [alice, bob]) peer.socket.end();
    expect(await server.exited).toBe(1);
    expect(server.problems).toContain("on purpose");
    expect(server.output).toContain("Server is shutting down");
  });
});

// --- The room and its events ---------------------------------------------------------------------

describe("apply", () => {
  type Row = [event: RoomEvent, heard: string | null, people: string];

  /** Applies events in turn, each with what the room hears of it (null: nothing) and who is here. */
  function play(...rows: Row[]): void {
    const room = new Room();
    for (const [event, heard, people] of rows) {
      const outcome = apply(room, event);
      const said = outcome && "heard" in outcome ? outcome.heard : null;
      const { type, clientId } = event;
      expect([
        type,
        clientId,
        said,
        Array.from(room.people.values(), ({ name }) => name).join(" "),
      ]).toEqual([type, clientId, heard, people]);
    }
  }

  test("a room is what its events have made of it", () => {
    play(
      [{ type: "join", clientId: 1, name: "alice" }, "* alice has joined the chat", "alice"],
      [{ type: "join", clientId: 2, name: "bob" }, "* bob has joined the chat", "alice bob"],
      [{ type: "say", clientId: 1, text: "hello" }, "[alice] hello", "alice bob"],
      [{ type: "join", clientId: 3, name: "ALICE" }, null, "alice bob"],
      [{ type: "nick", clientId: 2, name: "Alice" }, null, "alice bob"],
      [{ type: "nick", clientId: 1, name: "Alice" }, "* alice is now called Alice", "Alice bob"],
      [{ type: "nick", clientId: 1, name: "carol" }, "* Alice is now called carol", "carol bob"],
      [
        { type: "join", clientId: 3, name: "alice" },
        "* alice has joined the chat",
        "carol bob alice",
      ],
      [{ type: "leave", clientId: 1, reason: "" }, "* carol has left the chat", "bob alice"],
      [{ type: "say", clientId: 3, text: "bye" }, "[alice] bye", "bob alice"],
      [
        { type: "leave", clientId: 3, reason: " (too slow)" },
        "* alice has left the chat (too slow)",
        "bob",
      ],
    );
  });

  test("an event that comes too late changes nothing", () => {
    play(
      [{ type: "say", clientId: 1, text: "hello" }, null, ""],
      [{ type: "nick", clientId: 1, name: "alice" }, null, ""],
      [{ type: "leave", clientId: 1, reason: "" }, null, ""],
      [{ type: "join", clientId: 1, name: "alice" }, "* alice has joined the chat", "alice"],
      [{ type: "join", clientId: 1, name: "bob" }, null, "alice"],
      [{ type: "leave", clientId: 1, reason: "" }, "* alice has left the chat", ""],
      [{ type: "leave", clientId: 1, reason: "" }, null, ""],
      [{ type: "say", clientId: 1, text: "hello" }, null, ""],
    );
  });

  test("a name that only looks like another one is not called taken", () => {
    for (const [held, name] of [
      ["Torn", "Tom"],
      ["Tom", "Torn"],
      ["alice", "aIice"],
    ] as const) {
      const room = new Room();
      apply(room, { type: "join", clientId: 1, name: held });
      const refused = `* The name ${name} looks like one that is taken.`;
      expect(apply(room, { type: "join", clientId: 2, name })).toEqual({ refused });
    }
  });

  test("a name is refused in words, at that point of the order", () => {
    const room = new Room();
    const refuse = (name: string) => apply(room, { type: "join", clientId: 9, name });
    expect(refuse("")).toEqual({ refused: NAME_RULE });
    expect(refuse("a".repeat(129))).toEqual({ refused: NAME_RULE });
    expect(refuse("bоb")).toEqual({ refused: SCRIPT_RULE });
    apply(room, { type: "join", clientId: 1, name: "bob" });
    expect(refuse("Bob")).toEqual({ refused: "* The name Bob is taken." });
    expect(refuse("b0b")).toEqual({ refused: "* The name b0b looks like one that is taken." });
    apply(room, { type: "nick", clientId: 1, name: "bob2" });
    expect(refuse("b0b")).toMatchObject({ heard: "* b0b has joined the chat" });
  });

  test("all keys of a name are free when its holder has left or has another one", () => {
    const room = new Room();
    for (const name of ["mam", "Ill", "Straße", "Аӏісе"]) {
      apply(room, { type: "join", clientId: 1, name });
      apply(room, { type: "nick", clientId: 1, name: "someone" });
      apply(room, { type: "leave", clientId: 1, reason: "" });
    }
    expect(room).toEqual(new Room());
  });

  test("the same events make the same room, whatever they are", () => {
    const random = randomNumbers(5);
    const names = ["bob", "Bob", "b0b", "ΤΟΜ", "Tom", "mam", "rnarn", "", "bоb", "Zoë", "a b"];
    const events = Array.from({ length: 3000 }, (): RoomEvent => {
      const clientId = random(8);
      const name = names[random(names.length)] ?? "";
      const kinds: RoomEvent[] = [
        { type: "join", clientId, name },
        { type: "nick", clientId, name },
        { type: "say", clientId, text: name },
        { type: "leave", clientId, reason: "" },
      ];
      return kinds[random(4)] ?? { type: "say", clientId, text: "" };
    });
    const [one, other] = [new Room(), new Room()];
    for (const event of events) {
      expect(apply(one, event)).toEqual(apply(other, event));
      // Nobody holds a name that somebody else holds, nor keeps one after leaving.
      const holders = new Set(one.owners.values());
      expect(Array.from(holders).sort()).toEqual(Array.from(one.people.keys()).sort());
    }
    expect(one).toEqual(other);
  });
});

// --- Strangers -------------------------------------------------------------------------------------

describe("names of all the world", () => {
  const WELCOME_NAMES = `
    Zoë Øyvind Łukasz Þórdís Ağaoğlu İpek Çınar Győző Đorđe Nguyễn Trần Ştefan Ñusta Āria Ǹjídékà Ọláolú
    Ɛfua Ŋaaba Алиса7 Юрий Їжак Ђорђе Ғабит Өнөр Ελένη Άννα Πλάτων Արամ Գոհար თამარ נועם אליס שָׂרָה
    محمد أحمد فاطمه پریسا ژاله ރަޝީދު राम कृष्ण श्री ज़ेंडाया সুমন ਗੁਰਪ੍ਰੀਤ પ્રિયા ଜଗନ୍ନାଥ தமிழ் శ్రీ ಕಾವ್ಯ
    ശ്രീജ සුනිල් สมชาย นิ่ม ນາງ ဖြိုး မျိုး သူရ កុសល ចាន់ སྒྲོལ བསྟན አበበ ሰላም 小明 王芳 佐々木 たろう
    マリー ハナコ 山田たろう 김철수 金민지 ㄋㄚㄋㄚ ᏣᎳᎩ ᐃᓄᒃ ⴰⵎⴰⵢⴰⵙ ߒߞߏ ꓡꓲꓢꓴ ᠪᠠᠲᠤ ꦱꦫꦶ ᱥᱟᱱ 𞤀𞤣𞤤𞤢𞤥 7 x1 राम७ علی٣
    ශ්‍රී චන්ද්‍රිකා कर्‍हाडे علی‌رضا 𐓏𐓘𐓻 ᯅᯖᯂ ᨅᨔ ᜆᜄᜎᜓ ꚠꛁ 𖼐𖼕 ẹ̀kọ́ m̧ajel̗ G̃uasu`;

  test.each(WELCOME_NAMES.trim().split(/\s+/))("%s is welcome", (name) => {
    expect(apply(new Room(), { type: "join", clientId: 1, name })).toEqual({
      heard: `* ${name.normalize("NFKC")} has joined the chat`,
      logged: `User ${name.normalize("NFKC")} has joined the chat.`,
    });
  });

  test.each([
    "аlice",
    "Вob",
    "aλ",
    "яλ",
    "bob7я",
    "bօb",
    "b໐b",
    "bo७b",
    "小明Bob",
    "たろうTaro",
    "aʼ",
    "aː",
    "bob\u02b9",
    "بـوب",
    "bx\u0301\u0302\u0303b",
    "ка\u064bт",
    "राम\u0b3c",
    "ᴀlice",
    "bob\ua78c",
    "Ⲁⲛ",
    "T\u0335om",
    "O\u0338le",
    "A\u0366sa",
    "ab\u0363",
  ])("%s is not written in one script, or is ornate, and is refused", (name) => {
    expect(apply(new Room(), { type: "join", clientId: 1, name })).toEqual({
      refused: SCRIPT_RULE,
    });
  });

  // Each row is a name that is taken, and what must not get in while it is.
  test.each([
    [
      "alice",
      "ALICE aIice a1ice aliсe аlice Аӏісе ɑlice alıce aӏice alɩce Αlice aǀice ａlice 𝒂lice",
    ],
    ["bob", "BOB b0b B0B bоb bοb bօb ΒΟΒ ВОВ Ьоь Ƅoƅ b໐b b०b Ꮟob ᗷOᗷ ꓐꓳꓐ"],
    ["Tom", "tom TOM ΤΟΜ ТОМ T0m Tοm Tоm ꓔꓳꓟ Torn ТОM"],
    ["mam", "rnam marn rnarn MAM"],
    ["Ill", "lll I1l 111 ӀӀӀ ΙΙΙ I11"],
    ["Tim", "Ti\u0307m Tı\u0307m Tі\u0307m"],
    ["jim", "j\u0307im ji\u0307m"],
    ["Şule", "Șule"],
    ["Doğan", "Doǧan"],
    ["Ôto", "Ȏto"],
    ["Ņina", "Ɲina"],
    ["Įva", "ɭva"],
    ["ÇECA", "ҪЕСА"],
    ["ãp", "ᾶρ"],
    ["३२८", "૩૨૮ 328"],
    ["٣٤٦", "۳۴۶ 346"],
    ["០០", "00 OO oo ०० ໐໐"],
    ["Đuro", "Ðuro"],
    ["ශ්‍රී", "ශ්රී"],
    ["ΑΝΝΑ", "ANNA anna Anna"],
    ["Сара", "Capa CAPA"],
    ["nina", "ΝΙΝΑ"],
    ["опоо", "oпoo oπoo οποο"],
    ["пакот", "πακοτ"],
    ["user10", "user1O userI0 userl0 useг10"],
    ["Straße", "STRASSE strasse StraSSe"],
    ["naïve", "naїve NAÏVE nаїve"],
    ["Ես", "Եu"],
    ["нос", "HOC"],
  ])("while %s is here, nobody gets in as one of %s", (held, others) => {
    for (const name of others.split(" ")) {
      const room = new Room();
      apply(room, { type: "join", clientId: 1, name: held });
      const looks = `${name.normalize("NFKC")}`;
      const outcome = apply(room, { type: "join", clientId: 2, name });
      const expected = [
        { refused: SCRIPT_RULE },
        { refused: NAME_RULE },
        { refused: `* The name ${looks} is taken.` },
        { refused: `* The name ${looks} looks like one that is taken.` },
      ];
      expect(expected).toContainEqual(outcome as { refused: string });
    }
  });

  test.each([
    ["Lia", "Ila"],
    ["Ian", "Lan"],
    ["Iida", "Lida"],
    ["İpek", "Ipek"],
    ["Ali", "All"],
    ["Вова", "Bob"],
    ["Ян", "Яна"],
    ["user1", "user2"],
    ["Marta", "Marna"],
    ["Sam", "5am"],
    ["Αννα", "Ανα"],
    ["王", "玉"],
  ])("%s and %s are two people", (one, other) => {
    const room = new Room();
    apply(room, { type: "join", clientId: 1, name: one });
    expect(apply(room, { type: "join", clientId: 2, name: other })).toHaveProperty("heard");
  });
});

describe("clean text", () => {
  test.each([
    ["left-to-right and right-to-left marks", "a\u200e\u200f\u061cb", "ab"],
    ["a byte order mark", "\ufeffa\ufeffb", "ab"],
    ["interlinear annotations", "a\ufff9b\ufffac\ufffbd", "abcd"],
    ["tags", "a\u{e0001}\u{e0041}\u{e007f}b", "ab"],
    ["bidirectional controls", "a\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069b", "ab"],
    ["line separators", "a\u2028\u2029\u0085b", "ab"],
    ["an escape sequence", "\u001b[31mred\u009b0m", "[31mred0m"],
    [
      "hundreds of marks on one letter",
      `a${"\u0301\u0302".repeat(200)}b`,
      "a\u0301\u0302\u0301\u0302b",
    ],
    ["marks between joiners", `a${"\u0301\u200d".repeat(50)}b`, "a\u0301\u200d\u0301\u200db"],
    [
      "marks between what cannot be seen",
      `a${"\u0301\u034f".repeat(50)}b`,
      "a\u0301\u034f\u0301\u034fb",
    ],
    ["enclosing marks", `a${"\u20dd".repeat(9)}`, `a${"\u20dd".repeat(4)}`],
    [
      "marks between those that have a width",
      `a${"\u0301\u0903".repeat(50)}b`,
      `a${"\u0301\u0903".repeat(4)}b`,
    ],
    ["vowels of Hangul", `가${"\u1161".repeat(99)}b`, `가${"\u1161".repeat(4)}b`],
    [
      "marks between format controls",
      `a${"\u0301\u070f".repeat(50)}b`,
      "a\u0301\u070f\u0301\u070fb",
    ],
  ])("%s", (_, sent, shown) => {
    expect(cleanText(sent)).toBe(shown);
  });

  test.each([
    "plain text, \ttabbed",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 ❤️ 1️⃣ 🏳️‍🌈 🇩🇪",
    "می‌روم",
    "क्‍ष श्री ज़ेंडाया",
    "လျှို့ဝှက်",
    "שָׁלוֹם",
    "Tiếng Việt, é ê\u0323",
    "བསྒྲུབས",
    "漢\u{e0100}字",
  ])("%j stays as it is", (text) => {
    expect(cleanText(text)).toBe(text);
  });
});

describe("a first line", () => {
  test.each([
    ["a zero byte in it", "b\0ob\n"],
    ["an escape in it", "b\u001bob\n"],
    ["a return in it", "bo\rb\n"],
    ["a mark of direction in it", "bob\u200f\n"],
    ["a byte order mark before it", "\ufeffbob\n"],
    ["127 letters too many", `${"b".repeat(159)}\n`],
    ["4,000 marks", `a${"\u0315\u0300\u05b0".repeat(700)}\n`],
    ["much without a newline", "x".repeat(600)],
    ["an HTTP request", "GET / HTTP/1.1\r\nHost: x\r\n\r\nmallory\nhello\n"],
    ["a WebSocket handshake", "GET /chat HTTP/1.1\nUpgrade: websocket\n\nmallory\nhello\n"],
    ["the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmallory\nhello\n"],
  ])("with %s ends the connection, and nothing of it is heard", async (_, bytes) => {
    const server = open();
    const alice = await enter(server, "alice");
    const mallory = await greeted(server);
    mallory.send(bytes);
    const answer = await mallory.rest();
    expect(answer).toEqual([NAME_RULE]);
    await enter(server, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
  });

  test("that is a TLS hello ends the connection, wherever its random bytes hold a newline", async () => {
    const log: string[] = [];
    const server = open({ log: (event) => log.push(event) });
    const alice = await enter(server, "alice");
    const random = randomNumbers(7);
    const hellos = Array.from({ length: 300 }, (_, number) => {
      const bytes = Buffer.from(Array.from({ length: 120 }, () => random(256)));
      bytes.set([0x16, 0x03, random(4), 0x00, 0xf4, 0x01]);
      bytes.write("\nmallory\nhello\n", 6 + random(60));
      return [bytes, bytes.subarray(0, 1 + (number % 80)), bytes.subarray(1 + (number % 80))];
    });
    await Promise.all(
      hellos.map(async ([whole, head, tail], number) => {
        const peer = await greeted(server);
        if (!whole || !head || !tail) throw new Error();
        if (number % 2 === 0) peer.send(whole);
        else peer.send(head);
        if (number % 2 === 1) peer.send(tail);
        expect(await peer.rest()).toEqual([]);
      }),
    );
    await enter(server, "bob");
    expect(await alice.line()).toBe("* bob has joined the chat");
    expect(log.filter((event) => event.endsWith(": it speaks TLS"))).toHaveLength(300);
  });

  test("is not normalized, nor is any other word, unless it is short", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    // Marks in descending order of their class, which take time that grows with its square.
    const marks = `a${"\u0315\u0300\u05b0".repeat(600)}`;
    const { normalize } = String.prototype;
    let longest = 0;
    String.prototype.normalize = function (...form: [string?]) {
      longest = Math.max(longest, this.length);
      return normalize.apply(this, form);
    };
    try {
      for (const command of [
        `/msg ${marks} x`,
        `/nick ${marks}`,
        `/${marks}`,
        `/who ${marks}`,
        marks,
      ])
        alice.send(`${command}\n`.repeat(5));
      alice.send("done\n");
      await bob.until("[alice] done");
      const stranger = await greeted(server);
      stranger.send(`${marks}\n`);
      expect(await stranger.rest()).toEqual([NAME_RULE]);
    } finally {
      String.prototype.normalize = normalize;
    }
    expect(longest).toBeLessThanOrEqual(128);
  });
});

describe("budgets", () => {
  /** A room that limits addresses, as on a network. */
  const openToNetwork = (options: Partial<ServerOptions> = {}) =>
    open({ rate: 10, maxPerAddress: 64, ...options });

  /** Lets the event loop do whatever it can do without the time passing. */
  async function settle(): Promise<void> {
    for (let turn = 0; turn < 200; turn++) await new Promise((resolve) => setImmediate(resolve));
  }

  test("a line costs by its length", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    jest.advanceTimersByTime(30_000);
    const lines = Array.from({ length: 30 }, (_, number) => `${number} `.padEnd(4096, "x"));
    alice.send(lines.map((line) => `${line}\n`).join(""));
    // 100 short lines' worth: eleven of nine.
    for (let number = 0; number < 11; number++)
      expect(await bob.line()).toBe(`[alice] ${lines[number]}`);
    bob.send("/nick bob\n");
    expect(await bob.line()).toBe("* You are called bob already.");
    for (let tick = 0; tick < 80; tick++) jest.advanceTimersByTime(100);
    for (let number = 11; number < 19; number++)
      expect(await bob.line()).toBe(`[alice] ${lines[number]}`);
  });

  test("an answer costs by its size", async () => {
    jest.useFakeTimers();
    const server = open({ rate: 10 });
    const names = Array.from({ length: 500 }, (_, number) => `${number}`.padStart(32, "x"));
    const [first] = await Promise.all(names.map((name) => enter(server, name)));
    if (!first) throw new Error();
    await enter(server, "last");
    await first.until("* last has joined the chat");
    jest.advanceTimersByTime(30_000);
    first.send("/who\n".repeat(100));
    first.send("/nick x\n");
    // 34 characters a name make 17 KB: about four short lines' worth, and one for the asking.
    const answers = await first.lines(19);
    for (const answer of answers) expect(answer).toStartWith("* 501 people are here: ");
    await settle();
    expect(first.received.toString("latin1").split("\n").length - 1).toBeLessThan(4);
  });

  /** So many clients that say 400 lines each as soon as they are in. */
  async function flood(server: Server, count: number, prefix: string): Promise<Peer[]> {
    const names = Array.from({ length: count }, (_, number) => `${prefix}${number}`);
    const crowd = await Promise.all(names.map((name) => enter(server, name)));
    for (const peer of crowd) peer.send("spam\n".repeat(400));
    return crowd;
  }

  /** Counts what is said in a room, and waits for it. */
  function listen() {
    const said = new Map<string, number>(); // by the name of whoever said it
    let wake = () => {};
    const count = (prefix: string) =>
      Array.from(said, ([name, lines]) => (name.startsWith(prefix) ? lines : 0)).reduce(
        (sum, lines) => sum + lines,
        0,
      );
    return {
      count,
      log(event: string): void {
        const [, name] = /^Received message from (\w+): /.exec(event) ?? [];
        if (name) said.set(name, (said.get(name) ?? 0) + 1);
        wake();
      },
      async until(prefix: string, lines: number): Promise<void> {
        while (count(prefix) < lines) await new Promise<void>((resolve) => (wake = resolve));
      },
    };
  }

  /** Lets the time pass, and the event loop run. */
  async function pass(seconds: number): Promise<void> {
    for (let tick = 0; tick < seconds * 10; tick++) {
      jest.advanceTimersByTime(100);
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  test("all connections of one address have one, and none of them waits for ever", async () => {
    jest.useFakeTimers();
    const { log, count, until } = listen();
    const server = openToNetwork({ log });
    await flood(server, 10, "mallory");
    await until("mallory", 10 * NEWCOMER_LINES);
    const honest = await enter(server, "honest");
    await pass(20);
    honest.send("hello\n");
    for (let second = 0; count("honest") === 0; second++) {
      expect(second).toBeLessThan(3);
      await pass(1);
    }
    await pass(10);
    // Ten seconds' worth at once, and 40 lines a second.
    expect(count("mallory")).toBeGreaterThan(20 * 40);
    expect(count("mallory")).toBeLessThanOrEqual(400 + 33 * 40);
  });

  test("all people together have one, so that a reader keeps up with any number of them", async () => {
    jest.useFakeTimers();
    let bytes = 0;
    const server = open({
      rate: 1000,
      log: (event) => (bytes += event.startsWith("Received") ? 4096 : 0),
    });
    const names = Array.from({ length: 40 }, (_, number) => `user${number}`);
    const crowd = await Promise.all(names.map((name) => enter(server, name)));
    for (const peer of crowd) {
      peer.onlyCounts = true;
      peer.send(`${"x".repeat(4096)}\n`.repeat(60));
    }
    await pass(2);
    // Two seconds' worth at once, of 768 KiB, and what has been earned since.
    expect(bytes).toBeWithin(2 * 768 * 1024, 4.5 * 768 * 1024);
    const before = bytes;
    await pass(4);
    expect(bytes - before).toBeWithin(3 * 768 * 1024, 4.5 * 768 * 1024);
  });

  test("leaving and coming back does not renew it", async () => {
    jest.useFakeTimers();
    const { log, count, until } = listen();
    const server = openToNetwork({ log });
    const crowd = await flood(server, 10, "mallory");
    await until("mallory", 10 * NEWCOMER_LINES);
    await pass(20);
    for (const peer of crowd) peer.socket.terminate();
    await flood(server, 10, "again");
    await pass(3);
    // 40 short lines' worth for coming are owed first.
    expect(count("again")).toBeWithin(1, 3 * 40);
  });

  test("twenty connections of one address are greeted at once, then one a second", async () => {
    jest.useFakeTimers();
    const server = openToNetwork();
    const crowd = await Promise.all(Array.from({ length: 24 }, () => Peer.connect(server)));
    const early = crowd.splice(0, 20);
    for (const peer of early) expect(await peer.line()).toBe(WELCOME);
    for (const peer of crowd) peer.send("late\n");
    for (const number of [0, 1, 2, 3]) {
      await settle();
      expect(crowd.map(({ total }) => total > 0)).toEqual(crowd.map((_, place) => place < number));
      jest.advanceTimersByTime(1000);
      expect(await crowd[number]?.line()).toBe(WELCOME);
    }
    // The first of them has come in, by a name that was there before its greeting.
    expect(await crowd[0]?.line()).toBe("* The room contains: ");
    for (const peer of early) peer.socket.terminate();
  });

  test("under TLS those who wait shake no hands before", async () => {
    jest.useFakeTimers();
    const server = openTls({ rate: 10, maxPerAddress: 64 });
    const crowd = await Promise.all(Array.from({ length: 22 }, () => Peer.connect(server)));
    for (const peer of crowd.slice(0, 20)) expect(await peer.line()).toBe(WELCOME);
    const late = crowd.slice(20);
    for (const peer of late) peer.send("late\n");
    await settle();
    expect(late.map(({ secured }) => secured)).toEqual([false, false]);
    jest.advanceTimersByTime(1000);
    expect(await late[0]?.lines(2)).toEqual([WELCOME, "* The room contains: "]);
    expect(late[1]?.secured).toBeFalse();
  });

  test("one that waits for its greeting has a minute from then on, and may give up", async () => {
    jest.useFakeTimers();
    const server = openToNetwork();
    const early = await Promise.all(Array.from({ length: 20 }, () => greeted(server)));
    const [hasty, patient] = [await Peer.connect(server), await Peer.connect(server)];
    hasty.socket.terminate();
    await hasty.closed.promise;
    await pass(2);
    expect(await patient.line()).toBe(WELCOME);
    for (const peer of early) peer.socket.terminate();
    await pass(57);
    patient.send("patient\n");
    expect(await patient.line()).toBe("* The room contains: ");
  });

  test("at rate 0 there is none", async () => {
    const { log, until } = listen();
    const server = openToNetwork({ rate: 0, log });
    await flood(server, 30, "mallory");
    await until("mallory", 30 * 400);
  });

  test("on loopback each connection has only its own, unless addresses are limited", async () => {
    jest.useFakeTimers();
    const { log, until } = listen();
    const server = open({ rate: 10, log });
    await flood(server, 40, "mallory");
    await until("mallory", 40 * NEWCOMER_LINES);
  });

  test.each([
    ["127.0.0.1", "127.0.0.1"],
    ["::ffff:127.0.0.1", "127.0.0.1"],
    ["::FFFF:192.0.2.7", "192.0.2.7"],
    ["2001:db8:1:2:3:4:5:6", "2001:db8:1:2"],
    ["2001:db8:1:2::6", "2001:db8:1:2"],
    ["2001:db8:1:3::6", "2001:db8:1:3"],
    ["2001:db8::6", "2001:db8:0:0"],
    ["2001:db8::1:2:3:4:5", "2001:db8:0:1"],
    ["::1", "0:0:0:0"],
    ["fe80::1%eth0", "fe80:0:0:0"],
  ])("%s counts as %s", (host, key) => {
    expect(addressKey(host)).toBe(key);
  });

  test("an IPv4 address is the same by IPv6", async () => {
    const server = open({ host: "::", maxPerAddress: 1 });
    await enter(server, "alice"); // ::ffff:127.0.0.1
    expect(await (await Peer.connect(server)).rest()).toEqual([
      "* Too many connections from your address.",
    ]);
  });
});

describe("memory", () => {
  test("private messages that are not read count against their sender, who is told", async () => {
    const server = open();
    const [alice, bob, carol] = await enterThree(server);
    await lagBehind(server, [alice, bob, carol], 1);
    const before = queued(server, "carol");
    const text = "p".repeat(1000);
    for (let number = 0; number < 100; number++) {
      alice.send(`/msg carol ${number} ${text}\n`);
      await alice.line();
    }
    expect(queued(server, "carol") - before).toBeWithin(16_000, 20_000);
    alice.send("/msg carol more\n");
    const refusal = "* Your private messages are not being read. This one was not sent.";
    expect(await alice.line()).toBe(refusal);
    // It is no matter of others, nor of the rest that alice has to say.
    bob.send("/msg carol and this\n");
    expect(await bob.line()).toBe("[bob -> carol] and this");
    alice.send("hello\n");
    expect(await bob.line()).toBe("[alice] hello");

    carol.socket.resume();
    const heard = await carol.until("[alice] hello");
    const privates = heard.filter((line) => line.startsWith("[alice -> carol] "));
    expect(privates.map((line) => line.split(" ")[3])).toEqual(
      privates.map((_, number) => `${number}`),
    );
    expect(heard).toContain("[bob -> carol] and this");
    alice.send("/msg carol again\n");
    expect(await alice.line()).toBe("[alice -> carol] again");
    expect(await carol.line()).toBe("[alice -> carol] again");
  });

  test("20,000 private messages reach a reader who keeps up", async () => {
    const server = open();
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    alice.send(Array.from({ length: 20_000 }, (_, number) => `/msg bob ${number}\n`).join(""));
    const expected = Array.from({ length: 20_000 }, (_, number) => `[alice -> bob] ${number}`);
    expect(await bob.lines(20_000)).toEqual(expected);
    expect(await alice.lines(20_000)).toEqual(expected);
  });

  test("64 people who say 98 lines of 4 KB at once take little, and nobody is cut off", async () => {
    const server = await serve("--rate", "0", "--quiet");
    const names = Array.from({ length: 64 }, (_, number) => `user${number}`);
    const crowd = await enterAll(server, ...names);
    const before = crowd.map((peer) => peer.total);
    // In rounds of less than may wait for a reader, however slow this machine is.
    const text = `${"x".repeat(4000)}\n`.repeat(14);
    const lengths = names.map((name) => text.length + 14 * `[${name}] `.length);
    const sum = lengths.reduce((all, length) => all + length, 0);
    for (const peer of crowd) peer.onlyCounts = true;
    for (let round = 1; round <= 7; round++) {
      for (const peer of crowd) peer.send(text);
      const totals = lengths.map((own, place) => (before[place] ?? 0) + round * (sum - own));
      await Promise.all(crowd.map((peer, place) => peer.bytes(totals[place] ?? 0)));
    }
    expect(memory(server.process.pid, "VmHWM")).toBeLessThan(150 * 1024);
  });

  test("a crowd gets all long answers that it asks for at once, some a turn, and talk goes on", async () => {
    const server = open();
    const names = Array.from({ length: 250 }, (_, number) => "語".repeat(29) + (number + 100));
    const crowd = await Promise.all(names.map((name) => enter(server, name)));
    const [speaker, ...askers] = crowd;
    if (!speaker) throw new Error();
    for (const asker of askers) asker.send("/who\n/who\n/who\n"); // 6 MB for each round of answers
    speaker.send("hello\n");
    const answersBefore = [];
    for (const asker of askers) {
      const before: string[] = await asker.until(/hello$/);
      answersBefore.push(before.filter((line) => line.includes(" people are here: ")).length);
      let answers = answersBefore.at(-1) ?? 0;
      while (answers < 3) if ((await asker.line())?.includes(" people are here: ")) answers++;
    }
    expect(Math.min(...answersBefore)).toBe(0);
    expect(Math.max(...answersBefore)).toBe(1);
  });

  test("each of many who come at once gets a roster of its own", async () => {
    const server = open();
    const names = Array.from({ length: 300 }, (_, number) => "語".repeat(29) + (number + 100));
    const crowd = await Promise.all(names.map(() => greeted(server)));
    for (const [place, peer] of crowd.entries()) peer.send(`${names[place]}\n`);
    const rosters = await Promise.all(crowd.map((peer) => peer.line()));
    const sizes = rosters.map((roster) => roster?.match(/語+\d+/g)?.length ?? 0);
    expect(sizes.sort((a, b) => a - b)).toEqual(names.map((_, place) => place));
    expect(new Set(rosters).size).toBe(names.length);
    const last = rosters.find((roster) => roster?.match(/語+\d+/g)?.length === names.length - 1);
    expect(last).toStartWith(`* The room contains: ${names[0]}, ${names[1]}, `);
  });

  test("however many do not read what they ask for, it is bounded, and whoever holds most goes", async () => {
    const server = open();
    const witness = await enter(server, "witness");
    const names = Array.from({ length: 60 }, (_, number) => `greedy${number}`);
    const crowd = await Promise.all(names.map((name) => enter(server, name)));
    for (const peer of crowd) {
      peer.socket.pause();
      peer.send("/help\n".repeat(60_000)); // with answers of 300 bytes
    }
    let most = 0;
    for (let gone = 0; gone < 10;) {
      if ((await next(witness)).endsWith(" has left the chat (too slow)")) gone++;
      most = Math.max(most, server.memoryUsed);
    }
    expect(most).toBeWithin(200 * 1024 * 1024, 260 * 1024 * 1024);
    witness.send("/who\n");
    while (!(await next(witness)).includes(" people are here: "));
    for (const peer of crowd) peer.socket.terminate();
    while (server.clients.length > 1) await next(witness);
    expect(server.memoryUsed).toBe(0);
  });
});

describe("connections from one address", () => {
  const REFUSAL = "* Too many connections from your address.";

  test("are limited; a refused one is told, and a place that becomes free is taken", async () => {
    const server = open({ maxPerAddress: 2 });
    const [alice, bob] = (await enterAll(server, "alice", "bob")) as [Peer, Peer];
    const carol = await Peer.connect(server);
    carol.send("carol\n");
    expect(await carol.rest()).toEqual([REFUSAL]);
    carol.socket.end();
    await carol.closed.promise;
    bob.socket.end();
    expect(await alice.line()).toBe("* bob has left the chat");
    await enter(server, "dave");
    expect(await alice.line()).toBe("* dave has joined the chat");
  });

  test("that are refused take no place of others, however many they are and stay", async () => {
    const server = open({ maxClients: 10, maxPerAddress: 5 });
    const crowd = await Promise.all(Array.from({ length: 60 }, () => Peer.connect(server)));
    const first = await Promise.all(crowd.map((peer) => peer.line()));
    expect(first.filter((line) => line === WELCOME)).toHaveLength(5);
    expect(first.filter((line) => line === REFUSAL).length).toBeGreaterThanOrEqual(32);
    const { port } = server;
    const newcomer = createConnection({ host: "127.0.0.1", port, localAddress: "127.0.0.2" });
    expect(`${(await once(newcomer, "data"))[0]}`).toBe(`${WELCOME}\n`);
    newcomer.destroy();
  });

  test.each([
    ["0.0.0.0", 64],
    ["127.0.0.1", 70],
    ["localhost", 70],
    ["LOCALHOST", 70],
    ["::ffff:127.0.0.1", 70],
  ])("a server on %s takes %d of 70 if nothing is said", async (host, count) => {
    const server = open({ host });
    const crowd = await Promise.all(Array.from({ length: 70 }, () => Peer.connect(server)));
    const first = await Promise.all(crowd.map((peer) => peer.line()));
    expect(first.filter((line) => line === WELCOME)).toHaveLength(count);
    expect(first.filter((line) => line === REFUSAL)).toHaveLength(70 - count);
  });

  test("--max-per-address sets the limit, on loopback, too", async () => {
    const server = await serve("--max-per-address", "1");
    await enter(server, "alice");
    const bob = await Peer.connect(server);
    expect(await bob.rest()).toEqual([REFUSAL]);
    const wrong = new Program(process.execPath, "server.ts", "--max-per-address", "0");
    expect(await wrong.exited).toBe(2);
    expect(wrong.problems).toMatch(/^--max-per-address takes a number from 1/);
  });
});

// --- The client --------------------------------------------------------------------------------
// Its server is the smallest that keeps the public protocol, so nothing here rests on ours.

const CLIENT = `${import.meta.dir}/client.ts`;
const DEADLINE = 4000; // ms; only a test that fails waits so long
const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
});

/** Text that grows, and a way to wait for what comes next in it: each `until` starts behind the last. */
function transcript() {
  let [text, seen] = ["", 0];
  let changed = Promise.withResolvers<void>();
  return {
    get text() {
      return text;
    },
    add(more: string) {
      text += more;
      changed.resolve();
      changed = Promise.withResolvers();
    },
    /** Waits until `check` of the whole text is not undefined, and returns that. */
    async when<T>(check: (text: string) => T | undefined, missing: () => string): Promise<T> {
      const late = Promise.withResolvers<never>();
      const timer = setTimeout(() => late.reject(new Error(missing())), DEADLINE);
      try {
        for (;;) {
          const result = check(text);
          if (result !== undefined) return result;
          await Promise.race([changed.promise, late.promise]);
        }
      } finally {
        clearTimeout(timer);
      }
    },
    until(wanted: string | RegExp): Promise<string> {
      const pattern = typeof wanted === "string" ? RegExp(RegExp.escape(wanted)) : wanted;
      const next = () => {
        const match = pattern.exec(text.slice(seen));
        seen += match ? match.index + match[0].length : 0;
        return match?.[0];
      };
      return this.when(next, () => `no ${pattern} in ${JSON.stringify(text.slice(seen))}`);
    },
  };
}

type Member = {
  name: string;
  ended: boolean;
  write(bytes: string | Uint8Array): void;
  sent(): boolean;
  drop(): void;
};

/** The smallest Budget Chat server; all that clients say is in its transcript as `name: text`. */
function budgetChat(options: { greeting?: string; roster?: string; farewell?: string } = {}) {
  const heard = transcript();
  const peers: Member[] = [];
  const refusals: string[] = []; // the next names are answered with these
  const { greeting = "Welcome to the chat! What is your name?" } = options;
  const listener = Bun.listen<{ peer: Member; rest: Uint8Array }>({
    hostname: "127.0.0.1",
    port: 0,
    allowHalfOpen: true,
    socket: {
      open(socket) {
        let queue = new Uint8Array();
        const peer: Member = {
          name: "",
          ended: false,
          write(bytes) {
            queue = Buffer.concat([queue, Buffer.from(bytes)]);
            queue = queue.subarray(Math.max(0, socket.write(queue)));
          },
          sent: () => queue.length === 0,
          drop: () => socket.terminate(),
        };
        peers.push(peer);
        socket.data = { peer, rest: new Uint8Array() };
        if (greeting) peer.write(`${greeting}\n`);
      },
      drain(socket) {
        const { peer } = socket.data;
        peer.write("");
        if (peer.ended && peer.sent()) socket.shutdown();
      },
      data(socket, chunk) {
        const { peer } = socket.data;
        const lines = Buffer.concat([socket.data.rest, chunk]).toString().split("\n");
        socket.data.rest = Buffer.from(lines.pop() ?? "");
        for (const line of lines) {
          if (peer.name) {
            heard.add(`${peer.name}: ${line}\n`);
            continue;
          }
          const refusal = refusals.shift();
          heard.add(refusal ? `refused: ${line}\n` : `joined: ${line}\n`);
          if (refusal) {
            socket.write(`${refusal}\n`);
            socket.shutdown();
            return;
          }
          peer.name = line;
          if (options.roster !== "") {
            peer.write(`${options.roster ?? "* The room contains: bob, carol"}\n`);
          }
        }
      },
      end(socket) {
        socket.data.peer.ended = true;
        heard.add(`end of ${socket.data.peer.name}\n`);
        socket.data.peer.write(options.farewell ?? "");
        if (socket.data.peer.sent()) socket.shutdown();
      },
      close: (socket) => heard.add(`closed ${socket.data.peer.name}\n`),
    },
  });
  cleanups.push(() => listener.stop(true));
  return {
    port: listener.port,
    until: (wanted: string | RegExp) => heard.until(wanted),
    get heard() {
      return heard.text;
    },
    peers,
    refusals,
    say(...lines: string[]) {
      for (const peer of peers)
        if (peer.name) peer.write(lines.map((line) => `${line}\n`).join(""));
    },
    stop() {
      listener.stop(true);
    },
  };
}

/** A program in a pseudo-terminal. */
function inTerminal(command: string[], { columns = 80, env = {} as Record<string, string> } = {}) {
  const screen = transcript();
  const decoder = new TextDecoder();
  const child = Bun.spawn(command, {
    // Where CI is set, a terminal is taken for one without colours.
    env: { ...process.env, CI: undefined, NO_COLOR: "1", TERM: "xterm-256color", ...env },
    terminal: {
      cols: columns,
      rows: 24,
      data: (_, bytes) => screen.add(decoder.decode(bytes, { stream: true })),
    },
  });
  cleanups.push(() => child.kill("SIGKILL"));
  return {
    child,
    until: (wanted: string | RegExp) => screen.until(wanted),
    when: screen.when,
    get screen() {
      return screen.text;
    },
    type: (keys: string) => void child.terminal?.write(keys),
    exited: child.exited,
  };
}

const terminal = (port: number, args: string[] = [], options = {}) =>
  inTerminal([process.execPath, CLIENT, "--port", `${port}`, ...args], options);

/** A client in a pipe. */
function piped(port: number, args: string[] = []) {
  const child = Bun.spawn([process.execPath, CLIENT, "--port", `${port}`, ...args], {
    stdin: "pipe",
    stdout: "pipe",
    stderr: "pipe",
  });
  cleanups.push(() => child.kill("SIGKILL"));
  const result = (async () => {
    const [out, err] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    return { out, err, code: await child.exited };
  })();
  return { child, result, write: (text: string) => void child.stdin.write(text) };
}

/** What a person sees of `output` in a terminal so many columns wide: its rows, and where the cursor is. */
function picture(output: string, columns: number) {
  const rows: string[][] = [[]];
  let [x, y] = [0, 0];
  const row = () => (rows[y] ??= []);
  for (const [, up = "", code = "", character = ""] of output.matchAll(
    /\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])/gu,
  )) {
    const n = Number.parseInt(up) || 1;
    if (code === "A") y = Math.max(0, y - n);
    else if (code === "B") y += n;
    else if (code === "C") x = Math.min(columns - 1, x + n);
    else if (code === "D") x = Math.max(0, Math.min(x, columns - 1) - n);
    else if (code === "G") x = n - 1;
    else if (code === "J" || code === "K") {
      row().splice(x);
      if (code === "J") rows.splice(y + 1);
    } else if (character === "\r") x = 0;
    else if (character === "\n") y++;
    else if (character === "\t") x = Math.min(columns - 1, x - (x % 8) + 8);
    else if (character === "\x07" || code) continue;
    else {
      const width = Bun.stringWidth(character);
      if (x + width > columns) [x, y] = [0, y + 1];
      while (row().length < x) row().push(" ");
      row().splice(x, width, character, ...(width === 2 ? [""] : []));
      x += width;
    }
  }
  if (x === columns) [x, y] = [0, y + 1];
  const text = Array.from(rows, (cells = []) => cells.join("").trimEnd()).join("\n");
  return { text: text.trimEnd().replace(/^\d\d:\d\d /gm, ""), x, y };
}

/** Joins as Alex and waits for the prompt. */
async function joined(server: ReturnType<typeof budgetChat>, args: string[] = [], options = {}) {
  const alex = terminal(server.port, ["--name", "Alex", ...args], options);
  await alex.until("The room contains");
  await alex.until("You: ");
  return alex;
}

const paste = (text: string) => `\x1b[200~${text}\x1b[201~`;

describe("menu", () => {
  test("is what the originals show; q comes back to it, again and again; 2 exits", async () => {
    const server = budgetChat();
    const alex = terminal(server.port);
    await alex.until("Connected to server.");
    for (let round = 0; round < 3; round++) {
      await alex.until("1. Join the chat\r\nq. Leave the chat\r\n2. Exit the program\r\n");
      await alex.until("Enter your choice: ");
      alex.type("1\r");
      await alex.until("Enter your username: ");
      alex.type("Alex\r");
      await alex.until("Joining the chat as Alex...");
      await alex.until("You: ");
      alex.type("Hello everyone!\r");
      await server.until("Alex: Hello everyone!\n");
      alex.type("q\r");
      await server.until("end of Alex");
    }
    await alex.until("Enter your choice: ");
    alex.type("2\r");
    expect(await alex.exited).toBe(0);
    expect(picture(alex.screen, 80).text).toContain(
      "\nYou: Hello everyone!\nYou: q\n1. Join the chat",
    );
  });

  test("what is typed ahead is not lost", async () => {
    const server = budgetChat();
    const alex = terminal(server.port);
    alex.type("1\rAlex\rone\rtwo\rq\r2\r");
    await server.until("Alex: one\nAlex: two\nend of Alex");
    expect(await alex.exited).toBe(0);
  });

  test("a name that is refused is asked for again", async () => {
    const server = budgetChat();
    server.refusals.push("* The name Alex is taken.", "* A name is 1 to 32 letters and digits.");
    const alex = terminal(server.port, ["--name", "Alex"]);
    await alex.until("* The name Alex is taken.");
    await alex.until("Enter your username: ");
    alex.type("!\r");
    await alex.until("* A name is 1 to 32");
    await alex.until("Enter your username: ");
    alex.type("Al\r");
    await alex.until("The room contains");
    alex.type("hi\r");
    await server.until("Al: hi\n");
  });

  test("a connection that the server ends during the menu is made again to join", async () => {
    const server = budgetChat();
    const alex = terminal(server.port);
    await alex.until("Enter your choice: ");
    server.peers[0]?.drop();
    alex.type("1\rAlex\rhi\r");
    await server.until("Alex: hi\n");
    expect(server.peers).toHaveLength(2);
  });
});

describe("the end", () => {
  const keys = {
    "an empty line": "\r",
    "/quit": "/quit\r",
    "/QUIT ": "/QUIT \r",
    "Ctrl+D": "\x04",
    "Ctrl+C": "\x03",
  };
  for (const [what, typed] of Object.entries(keys)) {
    test(`${what} ends the program`, async () => {
      const server = budgetChat();
      const alex = await joined(server);
      alex.type(`bye\r${typed}`);
      await server.until("Alex: bye\nend of Alex");
      expect(await alex.exited).toBe(0);
    });
  }

  test("Ctrl+C with a line half typed, and at a server that never closes", async () => {
    const server = Bun.listen({
      hostname: "127.0.0.1",
      port: 0,
      allowHalfOpen: true,
      socket: {
        open: (socket) => void socket.write("name?\n"),
        data: (socket) => void socket.write("* The room contains: \n"),
        end() {},
      },
    });
    cleanups.push(() => server.stop(true));
    const alex = terminal(server.port, ["--name", "Alex"]);
    await alex.until("You: ");
    alex.type("half a li\x03");
    expect(await alex.exited).toBe(0);
  });

  /** Runs the client in a shell between two `stty -a`, whose answers must be the same. */
  async function restored(
    port: number,
    act: (shell: ReturnType<typeof inTerminal>) => Promise<void>,
  ) {
    const client = `sh -c 'echo "pid $$"; exec "$0" "$@"' "$0" "$@"`;
    const script = `stty -a; echo =; ${client}; echo "code $?"; stty -a; echo ==`;
    const command = [process.execPath, CLIENT, "--port", `${port}`, "--name", "Alex"];
    const shell = inTerminal(["sh", "-c", script, ...command]);
    const before = await shell.until(/^[^]*?=\r\n/);
    await act(shell);
    const code = await shell.until(/code \d+\r\n/);
    const after = await shell.until(/^[^]*?==\r\n/);
    expect(after.replace("==", "=")).toBe(before);
    expect(shell.screen.lastIndexOf("\x1b[?2004l")).toBeGreaterThan(
      shell.screen.lastIndexOf("\x1b[?2004h"),
    );
    expect(shell.screen).not.toContain("    at ");
    return Number(code.slice(5));
  }
  for (const [how, wanted] of [
    ["SIGTERM", 143],
    ["SIGHUP", 129],
    ["SIGINT", 0],
  ] as const) {
    test(`the terminal is as it was after ${how}`, async () => {
      const server = budgetChat();
      const code = await restored(server.port, async (shell) => {
        const pid = await shell.until(/pid \d+/);
        await shell.until("You: ");
        process.kill(Number(pid.slice(4)), how);
      });
      expect(code).toBe(wanted);
    });
  }

  test("the terminal is as it was when there is no server", async () => {
    const server = budgetChat();
    server.stop();
    const code = await restored(server.port, async (shell) => {
      await shell.until(
        `Could not connect to 127.0.0.1:${server.port}. Is the server running?\r\n`,
      );
    });
    expect(code).toBe(1);
  });

  test("the terminal is as it was after Ctrl+C in the middle of a paste", async () => {
    const server = budgetChat();
    const code = await restored(server.port, async (shell) => {
      await shell.until("You: ");
      shell.type("\x1b[200~one\rtwo\rthr");
      await server.until("Alex: two\n");
      shell.type("\x03");
    });
    expect(code).toBe(0);
  });

  test("a terminal that hangs up ends the program without a trace", async () => {
    const server = budgetChat();
    const problems = `${mkdtempSync(`${tmpdir()}/bun-chat-`)}/stderr`;
    cleanups.push(() => rmSync(dirname(problems), { recursive: true }));
    const client = [process.execPath, CLIENT, "--port", `${server.port}`, "--name", "Alex"];
    const alex = inTerminal(["sh", "-c", `exec "$0" "$@" 2>${problems}`, ...client]);
    await alex.until("You: ");
    alex.type("half a li");
    alex.child.terminal?.close();
    await server.until("end of Alex");
    await alex.exited;
    expect(await Bun.file(problems).text()).toBe("");
  });

  test("Ctrl+C while the server still holds back what was pasted says so", async () => {
    const server = open({ rate: 10 });
    const bob = await enter(server, "bob");
    const alex = terminal(server.port, ["--name", "Alex"]);
    await alex.until("You: ");
    alex.type(`${paste("a line\r".repeat(200))}half a line`);
    expect((await bob.lines(10)).at(-1)).toBe("[Alex] a line");
    await alex.until("half a line");
    alex.type("\x03");
    await alex.until("The last lines may be lost.");
    expect(await alex.exited).toBe(0);
  });

  test("after Ctrl+Z and fg typing goes on where it was", async () => {
    const server = budgetChat();
    const shell = inTerminal(["bash", "--norc", "-i"], { env: { PS1: "[shell] " } });
    await shell.until("[shell] ");
    shell.type(`${process.execPath} ${CLIENT} --port ${server.port} --name Alex\r`);
    await shell.until("You: ");
    shell.type("hello wor\x1a");
    await shell.until(/Stopped[^]*\[shell\] /);
    shell.type("fg\r");
    await shell.until("You: hello wor");
    shell.type("ld\x01!");
    await shell.until("You: !hello world");
    shell.type("\r");
    await server.until("Alex: !hello world\n");
    shell.type("\x04");
    await server.until("end of Alex");
  });
});

describe("typing", () => {
  const wide = "漢字かな交じり文を書いている人の端末は四十桁しかない、それでも乱れない";
  const long = "the quick brown fox jumps over the lazy dog ".repeat(2) + "and rests a while";
  for (const [what, text, keys, behind] of [
    ["short", "hello", "", 0],
    ["with the cursor in the middle", "hello", "\x1b[D\x1b[D", 2],
    ["wrapped over three rows", long, "", 0],
    ["wrapped, the cursor in the first row", long, "\x01", long.length],
    ["wide characters over two rows", wide, "\x1b[D".repeat(5), 5],
    ["an emoji with skin tone", "👍🏽 ok 👍🏽", "\x1b[D", 1],
    ["to the very last column", "x".repeat(35), "", 0],
    ["with a tab", "a\tb", "\x1b[D", 1],
  ] as const) {
    test(`is not disturbed by what arrives: ${what}`, async () => {
      const server = budgetChat();
      const alex = await joined(server, [], { columns: 40 });
      const before = [...text].slice(0, [...text].length - behind).join("");
      const said = ["Joining the chat as Alex...", "* The room contains: bob, carol"];
      const settled = (input = text, cursor = before) => {
        const above = said.map((line) => `${line}\r\n`).join("") + "You: ";
        const { x, y } = picture(above + cursor, 40);
        const wanted = { text: picture(above + input, 40).text, x, y };
        const isThat = (output: string) => Bun.deepEquals(picture(output, 40), wanted) || undefined;
        const wrong = () =>
          JSON.stringify([picture(alex.screen, 40), wanted, alex.screen], null, 1);
        return alex.when(isThat, wrong);
      };
      alex.type(paste(text) + keys);
      await settled();
      for (let i = 0; i < 3; i++) {
        server.say(`[bob] ${i}`);
        said.push(`[bob] ${i}`);
        await settled();
      }
      const twenty = Array.from({ length: 20 }, (_, i) => `[carol] message ${i}`);
      server.say(...twenty);
      said.push(...twenty);
      await settled();
      alex.type("!");
      await settled(`${before}!${text.slice(before.length)}`, `${before}!`);
      alex.type("\r");
      await server.until(`Alex: ${before}!${text.slice(before.length)}\n`);
    });
  }

  test("is drawn anew when the window becomes narrower and wider", async () => {
    const server = budgetChat();
    const alex = await joined(server, [], { columns: 80 });
    alex.type("half a line");
    await alex.until("half a line");
    for (const columns of [20, 100]) {
      const at = alex.screen.length;
      alex.child.terminal?.resize(columns, 24);
      alex.type("!");
      await alex.until("!");
      server.say(`[bob] at ${columns} columns`);
      await alex.until(`[bob] at ${columns} columns\r\n`);
      await alex.until("You: half a line!");
      expect(alex.screen.slice(at)).toContain(`[bob] at ${columns} columns\r\n`);
    }
    alex.type("\r");
    await server.until("Alex: half a line!!\n");
  });

  test("a paste of one very long line is quick, and is sent whole", async () => {
    const server = budgetChat();
    const alex = await joined(server);
    const long = "0123456789".repeat(2000);
    alex.type(`${paste(long)}\r`);
    await server.until(`Alex: ${long}\n`);
  });

  test("a paste at the menu does not end the program, whatever it holds", async () => {
    const server = budgetChat();
    const alex = terminal(server.port);
    await alex.until("Enter your choice: ");
    alex.type(paste("one\r\rtwo\r"));
    for (let line = 0; line < 3; line++) await alex.until("Enter your choice: ");
    alex.type("1\rAlex\rhi\r");
    await server.until("Alex: hi\n");
  });

  test("Up brings back what was said, and nothing of the menu", async () => {
    const server = budgetChat();
    const alex = terminal(server.port);
    await alex.until("choice: ");
    alex.type("1\r");
    await alex.until("username: ");
    alex.type("Alex\r");
    await alex.until("You: ");
    alex.type("first\rsecond\r");
    await server.until("second\n");
    alex.type("\x1b[A\x1b[A!\r");
    await server.until("Alex: first!\n");
    alex.type("\x1b[A".repeat(4) + "?\r");
    await server.until("Alex: ?\n");
  });

  test("Tab completes commands and names, latest speaker first, and only of those present", async () => {
    const server = budgetChat({ roster: "* The room contains: bob, bill, Boris, carol" });
    const alex = await joined(server);
    server.say(
      "[bill] hi",
      "[Boris] hi",
      "* bob has left the chat",
      "* barbara has joined the chat",
    );
    await alex.until("barbara has joined");
    const say = async (keys: string, wanted: string) => {
      alex.type(`${keys}.\r`);
      await server.until(`Alex: ${wanted}.\n`);
    };
    await say("b\t", "barbara: ");
    server.say("[bill] once more", "[carol] me too");
    await alex.until("me too");
    await say("b\t", "bill: ");
    await say("b\t\t", "barbara: ");
    await say("b\t\t\t", "Boris: ");
    await say("b\t\t\t\t", "bill: ");
    await say("hello bo\t", "hello Boris ");
    await say("bob\t", "bob");
    await say("/w\t", "/who");
    await say("/m\tca\t", "/msg carol ");
    server.say("* carol is now called dora");
    await alex.until("dora");
    await say("ca\t", "ca");
    await say("do\t", "dora: ");
  });

  test("a paste of 300 lines is sent without its blank lines and ends nothing", async () => {
    const server = budgetChat();
    const alex = await joined(server);
    const lines = Array.from({ length: 300 }, (_, i) => (i % 7 === 3 ? "" : `line ${i}\tof it`));
    lines[10] = "q";
    lines[11] = "// a comment";
    lines[12] = "/quit";
    alex.type(`${paste(lines.join("\r"))}\rand typed\r`);
    await server.until("Alex: and typed\n");
    const sent = lines
      .filter((line) => line !== "")
      .map((line) => `Alex: ${line.replace(/^\//, "//")}\n`);
    expect(server.heard).toContain(`joined: Alex\n${sent.join("")}Alex: and typed\n`);
    expect(picture(alex.screen, 80).text).toContain(
      "\nYou: line 1     of it\nYou: line 2     of it\n",
    );
  });
});

describe("display", () => {
  test("time, colours, notices, private messages, mentions and the bell", async () => {
    const server = budgetChat();
    const alex = await joined(server, ["--bell"], { env: { NO_COLOR: "" } });
    server.say("[bob] hello", "[bob] again", "[carol] alexander", "* note");
    const hello = await alex.until(
      /\x1b\[2m\d\d:\d\d\x1b\[0m \x1b\[38;5;\d+m\[bob\]\x1b\[0m hello/,
    );
    const again = await alex.until(
      /\x1b\[2m\d\d:\d\d\x1b\[0m \x1b\[38;5;\d+m\[bob\]\x1b\[0m again/,
    );
    expect(again.replace("again", "hello").slice(15)).toBe(hello.slice(15));
    await alex.until(/\[carol\]\x1b\[0m alexander/);
    await alex.until("\x1b[2m* note");
    expect(alex.screen).not.toContain("\x07");
    server.say("[bob] so, ALEX: look", "[bob -> Alex] psst");
    await alex.until(/\x1b\[1;7;38;5;\d+m\[bob\]\x1b\[0m\x1b\[1m so, ALEX: look\x1b\[0m\x07/);
    await alex.until("\x1b[1;35m[bob -> Alex] psst\x1b[0m\x07");
    server.say("[Alex -> bob] answer", "* bob is now called Alex2");
    await alex.until("[Alex -> bob] answer\x1b[0m\r\n");
  });

  test("those who come or go together are one line", async () => {
    const server = budgetChat();
    const alex = await joined(server);
    server.say("* a has joined the chat", "* b has joined the chat");
    await alex.until("* a and b have joined\r\n");
    server.say(...["a", "b", "c", "d", "e"].map((name) => `* ${name} has left the chat`));
    server.say("* f has left the chat (too slow)", "* g has entered the room", "[bob] hi");
    await alex.until("* a, b and 4 others have left\r\n");
    await alex.until(/\d\d:\d\d \* g has entered the room\r\n/);
  });

  test("no byte of a stranger's server reaches the terminal as a control", async () => {
    const server = budgetChat();
    const alex = await joined(server, ["--bell"]);
    const at = alex.screen.length;
    server.say(
      "[bob] \x1b]0;owned\x07\x1b[2J\x1b[?1049h\x9b31m\x08\x7f\rred\0",
      "\x1b[31m* \u202eevil\u2066 \u0085\u2028\u2029.",
      "[\x1b[5mbob] x\ty",
      `[bob] ${"z".repeat(100_000)}`,
      "[bob] last",
    );
    server.peers[0]?.write(
      Buffer.from([0x5b, 0x78, 0x5d, 0x20, 0xff, 0xc0, 0x80, 0xed, 0xa0, 0x0a]),
    );
    await alex.until(/\[x\] \ufffd+/);
    const shown = alex.screen.slice(at);
    expect(shown).toContain("[bob] ]0;owned[2J[?1049h31mred\r\n");
    expect(shown).toContain("[31m* evil .\r\n");
    expect(shown).toContain("[[5mbob] x\ty\r\n");
    expect(shown).toContain("… (");
    expect(shown.length).toBeLessThan(12_000);
    // What remains of escapes is the client's own: up, left edge, erase, column.
    expect(shown.replace(/\x1b\[\d*[AGJ]/g, "")).not.toMatch(/[^\P{C}\r\n\t]/u);
  });

  const joins = Array.from({ length: 2000 }, () => "* NAME has joined the chat\n").join("");
  test.each([
    ["messages", `${"[bob] all work and no play\n".repeat(2000)}${"x".repeat(100_000)}`],
    ["people", `[bob] no play\n${joins}`],
  ])("a flood of %s without end leaves Ctrl+C working", async (_, flood) => {
    const server = budgetChat();
    const alex = await joined(server);
    const fresh = () => flood.replaceAll("NAME", () => `x${Math.random().toString(36).slice(2)}`);
    const timer = setInterval(() => server.peers[0]?.ended || server.peers[0]?.write(fresh()), 1);
    cleanups.push(() => clearInterval(timer));
    await alex.until("no play");
    alex.type("\x03");
    expect(await alex.exited).toBe(0);
  });
});

describe("losing the server", () => {
  test("comes back under the same name, past its own ghost, with what was typed", async () => {
    const server = budgetChat();
    const alex = await joined(server);
    alex.type("/nick Al\r");
    await server.until("/nick Al");
    server.say("* Alex is now called Al");
    await alex.until("now called Al");
    server.refusals.push("* The name Al is taken.");
    server.peers[0]?.drop();
    await alex.until("Connection lost. Trying again in 1 s.");
    alex.type("meanwhile\rhalf ");
    await server.until("refused: Al\n");
    await alex.until(/\* The name Al is taken\. Trying again in \d s\./);
    await server.until("joined: Al\nAl: meanwhile\n");
    await alex.until("You: half ");
    alex.type("a line\r");
    await server.until("Al: half a line\n");
  }, 15_000); // it waits for two tries

  test("says how many lines were not sent when you leave before it is back", async () => {
    const server = budgetChat();
    const alex = await joined(server);
    server.stop();
    await alex.until("Trying again");
    alex.type("one\rtwo\r/quit\r");
    await alex.until("2 lines were not sent.");
    expect(await alex.exited).toBe(1);
  });

  const pace = { silence: 50, retry: 1, doubt: 50 };
  function screen() {
    const shown = transcript();
    return {
      shown,
      until: (wanted: string | RegExp) => shown.until(wanted),
      show: (entries: { text: string }[]) => {
        for (const { text } of entries) shown.add(`${text}\n`);
        return true;
      },
      notice: (text: string) => shown.add(`${text}\n`),
      person: true,
      ask: () => Promise.resolve(undefined),
      close() {},
    };
  }
  const at = (port: number) => ({ host: "127.0.0.1", port, tls: false });

  test("gives up on a server that never speaks", async () => {
    expect(PACE.silence).toBe(10_000);
    const server = budgetChat({ greeting: "" });
    const room = receiveMessages(at(server.port), screen(), pace);
    await expect(room.join()).rejects.toThrow("says nothing");
    const mute = budgetChat({ roster: "" });
    const other = receiveMessages(at(mute.port), screen(), pace);
    expect(await other.join()).toBe("");
    await expect(other.join("Alex")).rejects.toThrow("says nothing");
  });

  test("tries again after 1, 2, 4 ... 30 s", async () => {
    const server = budgetChat();
    const to = screen();
    const room = receiveMessages(at(server.port), to, pace);
    expect(await room.join("Alex")).toBe("");
    server.stop();
    for (const seconds of [
      "1",
      "2",
      "[345]",
      "[6-9]|10",
      "1[2-9]",
      "(2[4-9]|3[0-6])",
      "(2[4-9]|3[0-6])",
    ]) {
      await to.until(RegExp(`Trying again in (${seconds}) s`));
    }
    expect(await room.leave()).toBe("");
  });

  test("a server that is full is quoted", async () => {
    const server = Bun.listen({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open(socket) {
          socket.write("* The server is full. Try again later.\n");
          socket.shutdown();
        },
        data() {},
      },
    });
    cleanups.push(() => server.stop(true));
    for (const name of ["", "Alex"]) {
      const room = receiveMessages(at(server.port), screen());
      await expect(room.join(name)).rejects.toThrow("* The server is full. Try again later.");
    }
    const client = piped(server.port, ["--name", "Alex"]);
    const { err, code } = await client.result;
    expect([err, code]).toEqual(["* The server is full. Try again later.\n", 1]);
  });

  test("rosters and greetings in other words, and a refusal in other words", async () => {
    const server = budgetChat({ greeting: "* Who are you?", roster: "* Here are: bob, carol" });
    const to = screen();
    const room = receiveMessages(at(server.port), to, pace);
    server.refusals.push("No.");
    expect(await room.join("Alex")).toBe("No.");
    expect(await room.join("Alexa")).toBe("");
    await to.until("* Here are: bob, carol\n");
  });

  test("stops reading while stdout is full, so that nothing piles up", async () => {
    const server = budgetChat();
    const [slow, fast] = [screen(), screen()];
    const show = (entries: { text: string }[]) => slow.show(entries) && false;
    await receiveMessages(at(server.port), { ...slow, show }, pace).join("Slow");
    await receiveMessages(at(server.port), fast, pace).join("Fast");
    for (const word of ["more", "and more"]) {
      server.say(`[bob] ${word}`);
      await fast.until(`[bob] ${word}`);
    }
    expect(slow.shown.text).toBe("* The room contains: bob, carol\n");
    straw.stdout.emit("drain");
    await slow.until("[bob] more");
  });

  test("a line of which the lost connection took only a part is sent again, whole", async () => {
    const long = "x".repeat(1_000_000);
    const got = transcript();
    let connections = 0;
    const server = Bun.listen<undefined>({
      hostname: "127.0.0.1",
      port: 0,
      socket: {
        open: (socket) => void socket.write("name?\n"),
        data(socket, chunk) {
          const text = chunk.toString();
          if (text !== "Alex\n") return got.add(text);
          socket.write("* The room contains: \n");
          if (++connections > 1) return;
          socket.pause(); // the kernel's buffers fill up, and then the line is cut off
          got.add("paused");
        },
      },
    });
    cleanups.push(() => server.stop(true));
    const room = receiveMessages(at(server.port), screen(), pace);
    await room.join("Alex");
    await got.until("paused");
    for (let i = 0; i < 30; i++) void room.send(long);
    const sent = room.send("the end");
    server.stop(true);
    const again = Bun.listen<undefined>({
      hostname: "127.0.0.1",
      port: server.port,
      socket: {
        open: (socket) => void socket.write("name?\n"),
        data(socket, chunk) {
          const text = chunk.toString();
          got.add(text);
          if (text === "Alex\n") socket.write("* The room contains: \n");
        },
      },
    });
    cleanups.push(() => again.stop(true));
    await sent;
    await got.until("the end\n");
    const [, ...lines] = got.text.slice(got.text.indexOf("Alex\n")).split("\n");
    expect(lines.slice(0, -2).every((line) => line === long)).toBe(true);
    expect(lines.length).toBeGreaterThan(3);
    await room.leave();
  });
});

describe("in a pipe", () => {
  test("the first line is the name, blank lines are skipped, the room goes to stdout", async () => {
    const server = budgetChat();
    const client = piped(server.port);
    client.write("Alex\n\none\n  \ntwo");
    await server.until("joined: Alex\nAlex: one\n");
    server.say("[bob] hi", "* x has joined the chat", "* y has joined the chat");
    await client.child.stdin.end();
    await server.until("Alex: two\nend of Alex\n");
    expect(await client.result).toEqual({
      out: "* The room contains: bob, carol\n[bob] hi\n* x has joined the chat\n* y has joined the chat\n",
      err: "",
      code: 0,
    });
  });

  test("50,000 lines arrive complete and in order", async () => {
    const server = budgetChat();
    const lines = Array.from({ length: 50_000 }, (_, i) => `line ${i} ${"x".repeat(i % 50)}`);
    const client = piped(server.port, ["--name", "Alex"]);
    client.write(lines.join("\n"));
    void client.child.stdin.end();
    await server.until("end of Alex\n");
    expect((await client.result).code).toBe(0);
    expect(server.heard).toStartWith(
      `joined: Alex\n${lines.map((line) => `Alex: ${line}\n`).join("")}end of Alex\n`,
    );
  });

  test("all that the room said reaches a reader that comes late", async () => {
    const said = Array.from({ length: 20_000 }, (_, i) => `[bob] ${i}\n`).join("");
    const server = budgetChat({ farewell: said });
    const script = `exec 3<&0; : | "$0" "$@" | (read go <&3; cat)`;
    const command = [process.execPath, CLIENT, "--port", `${server.port}`, "--name", "Alex"];
    const client = Bun.spawn(["sh", "-c", script, ...command], { stdin: "pipe", stdout: "pipe" });
    cleanups.push(() => client.kill("SIGKILL"));
    await server.until("end of Alex");
    await server.until("closed Alex");
    client.stdin.write("go\n");
    void client.stdin.end();
    expect(await client.stdout.text()).toBe(`* The room contains: bob, carol\n${said}`);
  });

  test("ends quietly when nobody reads its output any more", async () => {
    const server = budgetChat();
    const client = Bun.spawn(
      [
        "bash",
        "-c",
        `"$0" "$@" | head -1; echo "code \${PIPESTATUS[0]}"`,
        process.execPath,
        CLIENT,
        "--port",
        `${server.port}`,
        "--name",
        "Alex",
      ],
      { stdin: "pipe", stdout: "pipe", stderr: "pipe" },
    );
    cleanups.push(() => client.kill("SIGKILL"));
    await server.until("joined: Alex");
    const timer = setInterval(() => server.say("[bob] anybody?"), 20);
    cleanups.push(() => clearInterval(timer));
    expect(await client.stdout.text()).toBe("* The room contains: bob, carol\ncode 0\n");
    expect(await client.stderr.text()).toBe("");
  });

  test("a full disk is said, and is exit code 1", async () => {
    const server = budgetChat();
    const client = Bun.spawn(
      [process.execPath, CLIENT, "--port", `${server.port}`, "--name", "A"],
      {
        stdin: "pipe",
        stdout: Bun.file("/dev/full"),
        stderr: "pipe",
      },
    );
    cleanups.push(() => client.kill("SIGKILL"));
    expect(await client.exited).toBe(1);
    expect(await client.stderr.text()).toMatch(/^ENOSPC[^\n]*\n$/);
  });

  test("connects again when the server was lost, and sends the rest", async () => {
    const server = budgetChat();
    const client = piped(server.port, ["--name", "Alex"]);
    client.write("one\n");
    await server.until("Alex: one\n");
    server.peers[0]?.drop();
    client.write("two\n");
    void client.child.stdin.end();
    await server.until("joined: Alex\nAlex: two\nend of Alex\n");
    const { err, code } = await client.result;
    expect([err, code]).toEqual(["Connection lost. Trying again in 1 s.\n", 0]);
  });

  test("a refused name, and no name at all, is exit code 1", async () => {
    const server = budgetChat();
    server.refusals.push("* The name Alex is taken.");
    const client = piped(server.port, ["--name", "Alex"]);
    expect(await client.result).toEqual({ out: "", err: "* The name Alex is taken.\n", code: 1 });
    const nameless = piped(server.port);
    void nameless.child.stdin.end();
    expect((await nameless.result).code).toBe(1);
  });
});

describe("the command line", () => {
  const run = async (...args: string[]) => {
    const child = Bun.spawn([process.execPath, CLIENT, ...args], {
      stdout: "pipe",
      stderr: "pipe",
    });
    const [out, err] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    return { out, err, code: await child.exited };
  };

  test("wrong usage is one line on stderr and exit code 2", async () => {
    for (const args of [
      ["--nope"],
      ["stray"],
      ["--port"],
      ["--port", "0"],
      ["--port", "65536"],
      ["--port", "x"],
      ["--port", "--tls"],
    ]) {
      const { out, err, code } = await run(...args);
      expect([out, code]).toEqual(["", 2]);
      expect(err).toMatch(/^[^\n]+ Try --help\.\n$/);
    }
  });

  test("--help and --version", async () => {
    const help = await run("--help");
    expect(help.code).toBe(0);
    for (const word of ["--host", "127.0.0.1", "5555", "/msg NAME TEXT", "Tab", "Examples"]) {
      expect(help.out).toContain(word);
    }
    expect(await run("--version")).toEqual({ out: "0.1.0\n", err: "", code: 0 });
  });

  test("no server, and no such host, is one line and exit code 1", async () => {
    expect(await run("--host", "no.such.host.invalid")).toEqual({
      out: "",
      err: "Could not connect to no.such.host.invalid:5555. There is no such host.\n",
      code: 1,
    });
    const server = budgetChat();
    server.stop();
    expect(await run("--port", `${server.port}`, "--name", "Alex")).toEqual({
      out: "",
      err: `Could not connect to 127.0.0.1:${server.port}. Is the server running?\n`,
      code: 1,
    });
  });
});

describe("lines", () => {
  test("are the same however the bytes are cut", () => {
    const parts = [
      "a",
      "\n",
      "é",
      "漢",
      "👍🏽",
      "\r\n",
      "\n\n",
      "\ufeffx",
      "\u2028",
      "\x1b[0m",
      "\ufffd",
    ];
    const invalid = [[0xff], [0xe6, 0xbc], [0xf0, 0x9f], [0xc0, 0x80], [0xed, 0xa0, 0x80]];
    for (let round = 0; round < 300; round++) {
      const pick = <T>(from: T[]) => from[Math.floor(Math.random() * from.length)] as T;
      const bytes = Buffer.concat(
        Array.from({ length: 30 }, () =>
          Buffer.from(Math.random() < 0.8 ? pick(parts) : pick(invalid)),
        ),
      );
      const whole = splitLines(1000)(bytes);
      const split = splitLines(1000);
      const cut: string[] = [];
      for (let at = 0, next = 0; at < bytes.length; at = next) {
        next = at + 1 + Math.floor(Math.random() * 4);
        cut.push(...split(bytes.subarray(at, next)));
      }
      expect(cut).toEqual(whole);
      const end = bytes.lastIndexOf(10);
      const plain = end === -1 ? [] : bytes.toString("utf8", 0, end).split("\n");
      expect(whole.map((line) => line.length > 0)).toEqual(
        plain.map((line) => line.replace(/[\r\u2028\x1b]/g, "").length > 0),
      );
    }
  });

  test("are bounded", () => {
    const split = splitLines(10);
    for (let i = 0; i < 100; i++) expect(split(Buffer.from("abc"))).toEqual([]);
    expect(split(Buffer.from("abc\nnext\n"))).toEqual(["abcabcabca", "next"]);
  });
});

// --- Both together -----------------------------------------------------------------------------

describe("client and server", () => {
  test("people talk, whisper, change names and leave, in terminals and with bare sockets", async () => {
    const server = open();
    const alex = terminal(server.port, ["--name", "Alex"]);
    await alex.until("* The room contains: \r\n");
    const sam = terminal(server.port, ["--name", "Sam"]);
    await sam.until("* The room contains: Alex\r\n");
    await alex.until("* Sam has joined the chat");
    const kim = await enter(server, "Kim");
    await alex.until("* Kim has joined the chat");
    await sam.until("* Kim has joined the chat");
    alex.type("Hello 漢字 everyone!\r");
    await sam.until("[Alex] Hello 漢字 everyone!\r\n");
    expect(await kim.line()).toBe("[Alex] Hello 漢字 everyone!");
    sam.type("/msg ale\tpsst\r");
    await alex.until("[Sam -> Alex] psst");
    kim.send("/nick Kimberly\nhi\n");
    await alex.until("* Kim is now called Kimberly");
    await alex.until("[Kimberly] hi");
    expect(await kim.line()).toBe("* Kim is now called Kimberly");
    sam.child.kill("SIGKILL");
    await alex.until("* Sam has left the chat");
    expect(await kim.line()).toBe("* Sam has left the chat");
    alex.type("bye\r\x03");
    expect(await kim.lines(2)).toEqual(["[Alex] bye", "* Alex has left the chat"]);
    expect(await alex.exited).toBe(0);
  });

  test("a name that is taken is asked for again", async () => {
    const server = open();
    await enter(server, "Alex");
    const alex = terminal(server.port);
    await alex.until("Enter your choice: ");
    alex.type("1\rALEX\r");
    await alex.until("* The name ALEX is taken.");
    await alex.until("Enter your username: ");
    alex.type("Sam\r");
    await alex.until("* The room contains: Alex");
  });

  test.each([
    ["at rate 0, 50,000 lines", 0, 50_000],
    ["faster than the rate of 2000, 5,400 lines", 2_000, 5_400],
  ])("%s from a pipe arrive complete and in order", async (_, rate, count) => {
    const server = open({ rate });
    const reader = await enter(server, "reader");
    const writer = piped(server.port, ["--name", "writer"]);
    const lines = Array.from({ length: count }, (_, number) => `line ${number}`);
    writer.write(lines.join("\n"));
    void writer.child.stdin.end();
    const heard = await reader.until("* writer has left the chat");
    expect(heard).toEqual([
      "* writer has joined the chat",
      ...lines.map((line) => `[writer] ${line}`),
    ]);
    expect(await writer.result).toEqual({
      out: "* The room contains: reader\n",
      err: "",
      code: 0,
    });
  });

  test("a server that stops and starts again finds its people there", async () => {
    const server = await serve();
    const alex = terminal(server.port, ["--name", "Alex"]);
    await alex.until("The room contains");
    server.process.kill("SIGINT");
    await alex.until("* The server is shutting down");
    await alex.until("Connection lost. Trying again in 1 s.");
    expect(await server.exited).toBe(0);
    const again = open({ port: server.port });
    alex.type("still here\r");
    const reader = await enter(again, "reader");
    await reader.until("[Alex] still here");
  });
});

describe("the client under TLS", () => {
  const openssl = async (...args: string[]) =>
    expect(await Bun.spawn(["openssl", ...args], { stderr: "ignore" }).exited).toBe(0);

  test("people talk in terminals, with the certificate of the server for --ca", async () => {
    const server = openTls();
    const bob = await enter(server, "bob");
    const alex = terminal(server.port, ["--ca", certificate.cert, "--name", "Alex"]);
    await alex.until("* The room contains: bob");
    alex.type("hello\r");
    expect(await bob.lines(2)).toEqual(["* Alex has joined the chat", "[Alex] hello"]);
    bob.send("hi\n");
    await alex.until("[bob] hi");
    alex.type("\x04");
    expect(await alex.exited).toBe(0);
    expect(await bob.line()).toBe("* Alex has left the chat");
  });

  test("50,000 lines from a pipe arrive complete and in order", async () => {
    const server = openTls();
    const bob = await enter(server, "bob");
    const writer = piped(server.port, ["--ca", certificate.cert, "--name", "writer"]);
    writer.write(Array.from({ length: 50_000 }, (_, number) => `line ${number}\n`).join(""));
    void writer.child.stdin.end();
    const [first, ...lines] = await bob.until("* writer has left the chat");
    expect(first).toBe("* writer has joined the chat");
    expect(lines).toEqual(numbered("writer", 50_000));
    expect(await writer.result).toMatchObject({ err: "", code: 0 });
  });

  test("a certificate that proves nothing is one line with the reason, and nothing was sent", async () => {
    const path = (name: string) => `${folder}/${name}-cert.pem`;
    const elsewhere = await makeCertificate("elsewhere", "DNS:example.org");
    const signed = await makeCertificate("signed", "IP:127.0.0.1", [
      ...["-CA", certificate.cert, "-CAkey", certificate.key],
    ]);
    const signing = ["x509", "-in", certificate.cert, "-signkey", certificate.key];
    await openssl(...signing, "-days", "-1", "-out", path("expired"));
    const expired = { ...certificate, cert: path("expired") };
    for (const [shown, trust, reason] of [
      [certificate, ["--tls"], "Its certificate is self-signed: "],
      [expired, ["--ca", expired.cert], "Its certificate has expired: "],
      [elsewhere, ["--ca", elsewhere.cert], "Its certificate is for a wrong host: "],
      [signed, ["--tls"], "Its certificate is of an unknown authority: "],
    ] as const) {
      const heard: string[] = [];
      const server = Bun.listen({
        hostname: "127.0.0.1",
        port: 0,
        tls: { cert: Bun.file(shown.cert), key: Bun.file(shown.key) },
        socket: { data: (_, chunk) => void heard.push(chunk.toString()) },
      });
      cleanups.push(() => server.stop(true));
      const client = piped(server.port, [...trust, "--name", "Alex"]);
      client.write("a secret\n");
      const { out, err, code } = await client.result;
      expect(err).toStartWith(`Could not connect to 127.0.0.1:${server.port}. ${reason}`);
      expect(err.trimEnd().split("\n")).toHaveLength(1);
      expect([out, code, heard]).toEqual(["", 1, []]);
    }
  });

  test("a file for --ca that is none, or holds no certificate, is refused", async () => {
    for (const [file, code, line] of [
      [`${folder}/none`, 1, `${folder}/none cannot be read.\n`],
      [certificate.key, 2, `${certificate.key} holds no PEM certificate. Try --help.\n`],
    ] as const) {
      const { out, err, code: exitCode } = await piped(1, ["--ca", file, "--name", "Alex"]).result;
      expect([out, err, exitCode]).toEqual(["", line, code]);
    }
  });

  test("TLS to a server without it, and the other way round, is said", async () => {
    const plain = open();
    const { err, code } = await piped(plain.port, ["--tls", "--name", "Alex"]).result;
    expect(err).toEndWith("It does not speak TLS: leave --tls away.\n");
    expect(code).toBe(1);
    const pace = { silence: 50, retry: 1, doubt: 50 };
    const screen = {
      person: false,
      show: () => true,
      notice: () => {},
      ask: () => Promise.resolve(undefined),
      close() {},
    };
    const encrypted = { host: "127.0.0.1", port: openTls().port, tls: false };
    await expect(receiveMessages(encrypted, screen, pace).join()).rejects.toThrow(
      "It says nothing. Try --tls.",
    );
  });
});

// --- In a process of straw ---------------------------------------------------------------------

describe("main in this process", () => {
  let problems = spyOn(console, "error");
  const { argv } = real;

  beforeEach(() => {
    useStraw();
    straw.running = true;
    straw.removeAllListeners(); // a client of before must not hear the signals of now
    problems = spyOn(console, "error").mockImplementation(() => {});
    straw.shown = "";
    straw.exitCode = 0;
    stdin.isTTY = true;
  });

  afterEach(() => {
    real.argv = argv;
    straw.running = false;
    useReal();
    problems.mockRestore();
  });

  /** Starts the client. What it throws comes where an unhandled rejection would. */
  function client(...args: string[]): void {
    straw.removeAllListeners();
    stdin.removeAllListeners("keypress");
    straw.stdout.removeAllListeners();
    straw.exited = Promise.withResolvers();
    real.argv = ["bun", "client.ts", ...args];
    clientMain().catch((error) => {
      if (!`${error}`.includes("exit ")) straw.emit("unhandledRejection", error);
    });
  }

  async function until(text: string): Promise<void> {
    while (!straw.shown.includes(text))
      await new Promise((resolve) => straw.once("shown", resolve));
    straw.shown = straw.shown.slice(straw.shown.indexOf(text) + text.length);
  }

  test("the client in a terminal: menu, typing, Tab, paste, colours, Ctrl+Z, resize, leaving", async () => {
    const server = open();
    const [bob, carol] = (await enterAll(server, "bob", "carol")) as [Peer, Peer];
    client("--port", `${server.port}`, "--bell");
    await until("Enter your choice: ");
    stdin.write("x\r1\r");
    await until("Enter your username: ");
    stdin.write("bob\r");
    await until("* The name bob is taken.");
    await until("Enter your username: ");
    stdin.write("Alex\r");
    await until("The room contains: bob, carol");
    expect(await bob.line()).toBe("* Alex has joined the chat");
    bob.send("hi ALEX!\n/msg Alex psst\n/nick ben\n/quit\n");
    await until("\x1b[1m hi ALEX!\x1b[0m\x07");
    await until("\x1b[1;35m[bob -> Alex] psst");
    await until("ben has left");
    await carol.until("* ben has left the chat");
    stdin.write("ca\t");
    await until("carol: ");
    stdin.write("\x1a");
    await until("\x1b[J");
    straw.stdout.emit("resize");
    stdin.write("hello\r");
    expect(await carol.until("[Alex] carol: hello")).toEqual(
      ["* Alex has joined the chat"].slice(1),
    );
    stdin.write("\x1b[200~one\r\r/two\tof it\r\x1b[201~q\r");
    expect(await carol.lines(3)).toEqual([
      "[Alex] one",
      "[Alex] /two\tof it",
      "* Alex has left the chat",
    ]);
    await until("Enter your choice: ");
    stdin.write("2\r");
    expect(await straw.exited.promise).toBe(0);
    straw.emit("exit");
    expect(stdin.isRaw).toBe(false);
  });

  test("the client in a terminal: a server that is not there", async () => {
    client("--port", "1", "--name", "Alex");
    expect(await straw.exited.promise).toBe(1);
    expect(problems).toHaveBeenLastCalledWith(
      "Could not connect to 127.0.0.1:1. Is the server running?",
    );
  });

  test("the client in a pipe", async () => {
    const server = open();
    const bob = await enter(server, "bob");
    stdin.isTTY = false;
    const input = spyOn(Bun.stdin, "stream");
    input.mockReturnValueOnce(new Blob(["Alex\none\n\ntwo"]).stream());
    client("--port", `${server.port}`);
    expect(await straw.exited.promise).toBe(0);
    expect(straw.shown).toBe("* The room contains: bob\n");
    expect(await bob.lines(4)).toEqual([
      "* Alex has joined the chat",
      "[Alex] one",
      "[Alex] two",
      "* Alex has left the chat",
    ]);
    for (const [args, code, problem] of [
      [["--name", "bob"], 1, "* The name bob is taken."],
      [["--ca", "/no/such/file"], 1, "/no/such/file cannot be read."],
      [["--port", "0"], 2, "--port is a number from 1 to 65535, not '0'. Try --help."],
    ] as const) {
      input.mockReturnValueOnce(new Blob([]).stream());
      client("--port", `${server.port}`, ...args);
      expect(await straw.exited.promise).toBe(code);
      expect(problems).toHaveBeenLastCalledWith(problem);
    }
    client("--help");
    await until("Usage: bun client.ts");
    input.mockRestore();
  });

  test("the server", async () => {
    const log = spyOn(console, "log").mockImplementation(() => {});
    // When all is said the server sets a timer, in case its output holds up the end of the process.
    const later = globalThis.setTimeout;
    let stopped = Promise.withResolvers<void>();
    const timers = spyOn(globalThis, "setTimeout").mockImplementation(((
      act: () => void,
      ...rest: number[]
    ) => {
      if (act !== straw.exit) return later(act, ...rest);
      stopped.resolve();
      return later(() => {});
    }) as typeof setTimeout);
    const run = (...args: string[]) => {
      real.argv = ["bun", "server.ts", ...args];
      serverMain();
    };
    run("--port", "0", "--rate", "0");
    await until("Server is running on 127.0.0.1:");
    const alice = await enter({ port: Number.parseInt(straw.shown) }, "alice");
    alice.send("hi\n");
    await until("Received message from alice: hi");
    straw.emit("SIGTERM");
    expect(await alice.rest()).toEqual(["* The server is shutting down"]);
    expect(straw.listenerCount("SIGTERM")).toBe(0);
    alice.socket.end();
    await stopped.promise;
    stopped = Promise.withResolvers();
    straw.stderr.resume();
    const [cert, key] = [`${folder}/straw-cert.pem`, certificate.key];
    copyFileSync(certificate.cert, cert);
    run("--port", "0", "--tls-cert", cert, "--tls-key", key, "--quiet", "--max-clients", "1000000");
    await until("At most ");
    straw.emit("SIGHUP");
    await until("The certificate has been read again.");
    writeFileSync(cert, "no certificate\n");
    straw.emit("SIGHUP");
    expect(`${(await once(straw.stderr, "data"))[0]}`).toMatch(
      /The certificate stays as it was\. The certificate or the key is not in PEM/,
    );
    straw.emit("SIGINT");
    await stopped.promise;
    timers.mockRestore();
    expect(() => run("--version")).toThrow("exit 0");
    expect(() => run("--rate", "x")).toThrow('--rate takes a number from 0 to 1000000, not "x"');
    expect(() => run("--tls-cert", "x")).toThrow("--tls-cert and --tls-key go together");
    log.mockRestore();
  });
});
