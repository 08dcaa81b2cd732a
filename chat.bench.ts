#!/usr/bin/env bun
/**
 * The benchmark of bun-chat: what it costs to pass a line to many people, here and elsewhere.
 *
 *     bun chat.bench.ts             takes some two minutes
 *     bun chat.bench.ts --quick     takes twenty seconds and is less exact
 *
 * Each server is a process of its own. This process is the crowd: a socket for each of its people,
 * who speak, and count what arrives. The servers take turns, so that a machine that is busy with
 * something else for a while is unfair to all of them. The figure to trust is the CPU time that the
 * server spends on each line that it delivers to somebody: it depends least on who else uses the
 * machine. The benchmark fails when a line is missing or doubled.
 */

import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { cpus, release, tmpdir, type } from "node:os";
import { parseArgs } from "node:util";
import type { ServerWebSocket, Socket, SocketHandler, Subprocess } from "bun";

// --- The servers -------------------------------------------------------------------------------

/** A server, and how to take part in its room, which need not be a chat. */
type Contender = {
  name: string;
  command: string;
  join: string;
  joined: RegExp; // what has come when one has joined
  say: string; // {text} has 40 characters
  heard: string; // what the others hear of it
  echo?: boolean; // whether the one who said it hears it too
  aside?: string; // what comes besides, at most once in a run
  capacity?: number; // people
  isWeb?: boolean; // whether one connects by WebSocket; a frame holds one or more whole lines
};

/**
 * The room as everybody writes it first, with a write per message and client. Its source is handed
 * to `-e`, so it refers to nothing outside itself.
 */
async function naiveRoom(port: number): Promise<void> {
  const { createServer } = await import("node:net");
  const people = new Map<NodeJS.WritableStream, string>();
  const server = createServer({ noDelay: true }, (socket) => {
    const broadcast = (line: string) => {
      for (const person of people.keys()) if (person !== socket) person.write(line);
    };
    const take = (line: string) => {
      if (people.has(socket)) return broadcast(`[${people.get(socket)}] ${line}\n`);
      socket.write(`* The room contains: ${[...people.values()].join(", ")}\n`);
      people.set(socket, line);
      broadcast(`* ${line} has joined the chat\n`);
    };
    let rest = "";
    socket.write("Welcome to bun-chat! What is your name?\n");
    socket.on("data", (chunk) => {
      const lines = (rest + chunk).split("\n");
      rest = lines.pop() ?? "";
      lines.forEach(take);
    });
    socket.on("error", () => {}).on("close", () => people.delete(socket));
  });
  server.listen(port, "127.0.0.1", 512);
}

/**
 * The same room for WebSockets, as Bun's documentation shows it: Bun knows the subscribers, and
 * sends them a frame per message. This refers to nothing outside itself, either.
 */
function publishingRoom(port: number): void {
  const people = new Map<ServerWebSocket, string>();

  function take(socket: ServerWebSocket, line: string): void {
    const name = people.get(socket);
    if (name !== undefined) {
      socket.publish("room", `[${name}] ${line}\n`); // to all but the socket itself
      return;
    }
    socket.send(`* The room contains: ${[...people.values()].join(", ")}\n`);
    people.set(socket, line);
    socket.subscribe("room");
    socket.publish("room", `* ${line} has joined the chat\n`);
  }

  Bun.serve({
    hostname: "127.0.0.1",
    port,
    fetch(request, server) {
      if (server.upgrade(request)) return undefined;
      return new Response("This is for WebSockets.\n", { status: 426 });
    },
    websocket: {
      open(socket) {
        socket.send("Welcome to bun-chat! What is your name?\n");
      },
      message(socket, lines) {
        for (const line of lines.toString().trimEnd().split("\n")) take(socket, line);
      },
      close(socket) {
        people.delete(socket);
      },
    },
  });
}

const HOST = "127.0.0.1";
const OURS = "bun-chat";
const FOLDER = mkdtempSync(`${tmpdir()}/bun-chat-bench-`); // for histories in files
const BUDGET_CHAT = {
  join: "{name}\n",
  joined: /^.*\n.*\n/, // the greeting and the roster
  say: "{text}\n",
  heard: "[{name}] {text}\n",
};
const CONTENDERS: Contender[] = [
  { name: OURS, command: "{bun} {server} --quiet --rate 0 --port {port}", ...BUDGET_CHAT },
  {
    name: "bun-chat --db",
    command: "{bun} {server} --quiet --rate 0 --port {port} --db {history}",
    ...BUDGET_CHAT,
  },
  {
    name: "bun-chat, WebSocket",
    command: "{bun} {server} --quiet --rate 0 --port 0 --web {port}",
    isWeb: true,
    ...BUDGET_CHAT,
  },
  {
    name: "Bun.serve, publish",
    command: "{bun} -e {publishing}",
    isWeb: true,
    ...BUDGET_CHAT,
  },
  { name: "naive, Bun", command: "{bun} -e {naive}", ...BUDGET_CHAT },
  { name: "naive, Node", command: "node -e {naive}", ...BUDGET_CHAT },
  {
    name: "redis-server",
    command: "redis-server --bind 127.0.0.1 --port {port}",
    join: "HELLO 3\r\nCLIENT REPLY OFF\r\nSUBSCRIBE room\r\n", // RESP3 lets a subscriber publish
    joined: /^[^]*room\r\n:1\r\n/,
    say: "*3\r\n$7\r\nPUBLISH\r\n$4\r\nroom\r\n$40\r\n{text}\r\n",
    heard: ">3\r\n$7\r\nmessage\r\n$4\r\nroom\r\n$40\r\n{text}\r\n",
    echo: true,
  },
  {
    name: "nats-server",
    command: "nats-server -a 127.0.0.1 -p {port}",
    join: 'CONNECT {"verbose":false,"echo":false}\r\nSUB room 1\r\nPING\r\n',
    joined: /^[^]*PONG\r\n/,
    say: "PUB room 40\r\n{text}\r\n",
    heard: "MSG room 1 40\r\n{text}\r\n",
    aside: "PING\r\n",
  },
  {
    name: "ncat --broker",
    command: "ncat --broker -l 127.0.0.1 {port} -m 1010",
    join: "",
    joined: /^/,
    say: "{text}\n",
    heard: "{text}\n",
    capacity: 1_000, // it uses select(2), which ends at 1024 descriptors
  },
];

/** The words of a contender's command, by which it listens on `port` of 127.0.0.1. */
function commandLine({ command }: Contender, port: number): string[] {
  const values = new Map([
    ["{bun}", process.execPath],
    ["{server}", `${import.meta.dir}/server.ts`],
    ["{naive}", `(${naiveRoom})(${port})`],
    ["{publishing}", `(${publishingRoom})(${port})`],
    ["{history}", `${FOLDER}/${port}.sqlite`],
  ]);
  const words = command.trim().split(/\s+/);
  return words.map((word) => values.get(word) ?? word.replace("{port}", `${port}`));
}

const isOurs = ({ command }: Contender) => command.includes("{server}");

const isInstalled = (contender: Contender) =>
  Bun.which(commandLine(contender, 0)[0] ?? "") !== null;

// --- Options -----------------------------------------------------------------------------------

const LINES_A_SECOND = 200; // of all people together, in an evening

const USAGE = `Usage: bun chat.bench.ts [options]

Measures the server beside this file, by TCP and by WebSocket, against the naive rooms for either,
whatever else is installed of Node, Redis, NATS and ncat, and the peers that you name.

  conversation   some of the people speak, each its next line when its last has come through
  burst          the same with 50 lines of each speaker on their way
  evening        ${LINES_A_SECOND} lines a second in all, whether they come through or not
  arrival        many join, 200 at a time, and then sit there in silence

Latency ends when the last who joined hears a line, in an evening the first. Who is near 100 %,
server or crowd, is the limit; in an evening "late" is how many ms the crowd was late to speak.

  --quick                        takes twenty seconds, with fewer people and a single round
  --json                         prints the figures as JSON
  --peer 'NAME=COMMAND {port}'   adds another Budget Chat server, and may be repeated
  --help                         shows this text`;

const options = readOptions();
// Times are in ms. Patience is what a server has for a run beyond the talking, and ours ten times of
// it; a server that has used up its budget gets no more rounds of a workload.
const FULL = { rounds: 5, talk: 120, evening: 500, many: 1_000, arrivals: 5_000, rest: 1_000 };
const QUICK = { rounds: 1, talk: 50, evening: 200, many: 200, arrivals: 1_500, rest: 200 };
const SCALE = options.quick
  ? { ...QUICK, patience: 600, budget: 600 }
  : { ...FULL, patience: 2_000, budget: 1_500 };

function readOptions() {
  try {
    if (!existsSync("/proc/self/schedstat") || !Bun.which("taskset"))
      throw new Error("The benchmark needs Linux's /proc and taskset (util-linux)");
    const { values } = parseArgs({
      options: {
        quick: { type: "boolean", default: false },
        json: { type: "boolean", default: false },
        peer: { type: "string", multiple: true, default: [] },
        help: { type: "boolean", default: false },
      },
    });
    const peers = values.peer.map(readPeer);
    const names = [...CONTENDERS, ...peers].map(({ name }) => name);
    const twice = names.find((name, i) => names.indexOf(name) < i);
    if (twice) throw new Error(`Two servers cannot both be called "${twice}"`);
    if (!values.help) return { ...values, peers };
  } catch (error) {
    const [what] = (error instanceof Error ? error.message : String(error)).split(/\.\s/);
    console.error(`${what}. See bun chat.bench.ts --help.`);
    process.exit(2);
  }
  console.log(USAGE);
  process.exit(0);
}

function readPeer(text: string): Contender {
  const [, name = "", command = ""] = /^(.+?)=(.*{port}.*)$/.exec(text) ?? [];
  const peer = { name, command, ...BUDGET_CHAT };
  if (isInstalled(peer)) return peer;
  throw new Error(`--peer takes 'NAME=COMMAND {port}' with a program that exists, not "${text}"`);
}

// --- A server and its crowd --------------------------------------------------------------------

/** A server, and what its crowd has in common. */
class Room {
  startTime = 0; // ms
  threads = new Map<string, number[]>(); // ms that each has run, and waited for a core
  people: Socket<Person>[] = []; // those who have joined, in that order
  total = 0; // lines that were said in this run
  constructor(
    readonly contender: Contender,
    readonly port: number,
    readonly server: Subprocess,
  ) {}
}

/** One of the crowd. It is `socket.data` of its socket. */
class Person {
  bytes = 0; // that came since it joined, or since the run began
  spoken: number[] = []; // when it said its lines in this run
  hear: ((text: string) => void) | undefined; // set while it listens to every word
  constructor(readonly room: Room) {}
}

const QUIET = 10; // ms in which nothing may come after all that was to come
const IDLE = 200; // ms in which one sees whether a server is still at work

const running = new Set<Room>();
const CORES = /Cpus_allowed_list:\s*(.*)/.exec(readFileSync("/proc/self/status", "utf8"))?.[1];
const [SERVER_CORE = "0", CROWD_CORE = SERVER_CORE] = CORES?.match(/^\d+|\d+$/g) ?? [];

const TOO_SLOW = new Error("too slow");

function fail({ contender }: Room, why: string): never {
  progress("");
  console.error(`${contender.name}: ${why}`);
  process.exit(1);
}

/** Starts a server, and waits until it can be connected to. */
async function start(contender: Contender): Promise<Room> {
  const free = Bun.listen({ hostname: HOST, port: 0, socket: { data() {} } });
  const { port } = free;
  free.stop(true);
  const command = ["taskset", "-c", SERVER_CORE, ...commandLine(contender, port)];
  const begin = performance.now();
  // In a process group of its own, which ends as a whole, and hears no Ctrl+C before we do.
  const server = Bun.spawn(command, { stdio: ["ignore", "ignore", "ignore"], detached: true });
  const room = new Room(contender, port, server);
  running.add(room);
  for (;;) {
    room.startTime = performance.now() - begin;
    try {
      (await Bun.connect({ hostname: HOST, port, socket: { data() {} } })).terminate();
      break;
    } catch {
      if (server.exitCode !== null || room.startTime > 5_000) fail(room, "it does not start");
      await Bun.sleep(1);
    }
  }
  if (readFileSync(`/proc/${server.pid}/task/${server.pid}/children`, "utf8"))
    fail(room, "it has started another process, which is not measured: let the script exec it");
  return room;
}

function kill({ server }: Room): void {
  try {
    process.kill(-server.pid, "SIGKILL");
  } catch {
    // It has ended already.
  }
}

function stop(room: Room): void {
  running.delete(room);
  kill(room);
  for (const socket of room.people) socket.terminate();
}

const HANDLERS: SocketHandler<Person> = {
  data({ data: person }, chunk) {
    person.bytes += chunk.length;
    person.hear?.(chunk.toString("latin1"));
  },
  close({ data: { room } }) {
    if (running.has(room)) fail(room, "it closed a connection");
  },
};

function connect(person: Person): Promise<Socket<Person>> {
  const { contender, port } = person.room;
  if (contender.isWeb) return connectWebSocket(person);
  return Bun.connect({ hostname: HOST, port, data: person, socket: HANDLERS });
}

function send(socket: Socket<Person>, text: string): void {
  const { room } = socket.data;
  const bytes = room.contender.isWeb ? encodeFrame(text) : text;
  if (socket.write(bytes) !== bytes.length && running.has(room)) fail(room, "it does not read");
}

const NAME = "user00000"; // all names are as long

async function join(room: Room, name: string): Promise<void> {
  const { people, contender } = room;
  const person = new Person(room);
  let answer = "";
  person.hear = (chunk) => {
    answer += chunk;
    const joined = contender.joined.exec(answer)?.[0];
    if (joined === undefined) return;
    person.hear = undefined;
    person.bytes -= joined.length;
    people.push(socket);
  };
  const socket = await connect(person);
  send(socket, contender.join.replace("{name}", name));
  person.hear?.(""); // there may be no answer to wait for
}

/** Lets `count` people join, so many at a time. Returns when all had heard of all others. */
function fill(room: Room, count: number, atATime: number, patience?: number) {
  const { contender, people } = room;
  let next = 0;
  const isComplete = () => {
    for (; next < Math.min(people.length + atATime, count); next++)
      join(room, NAME.slice(0, -`${next}`.length) + next).catch((error) => {
        if (running.has(room)) fail(room, error.message);
      });
    if (people.length < count || contender.heard !== BUDGET_CHAT.heard)
      return people.length === count;
    // The last who joined hears of nobody's coming, the last but one of one, and so on.
    const heard = people.map(({ data }) => data.bytes).sort((a, b) => a - b);
    return heard.every((bytes, i) => bytes === i * (heard[1] || NaN));
  };
  return settle(room, isComplete, patience);
}

/** Waits until all has come that is to come, and no more. Returns when that was. */
async function settle(room: Room, isComplete: () => boolean, patience = SCALE.patience) {
  const deadline = performance.now() + patience * (isOurs(room.contender) ? 10 : 1);
  for (; !isComplete(); await Bun.sleep(1)) {
    if (performance.now() < deadline) continue;
    const before = usage(room);
    await Bun.sleep(IDLE);
    const { server, waited } = usage(room, before);
    if (isComplete() || server + waited > IDLE / 10) throw TOO_SLOW;
    fail(room, "a line is missing, came twice or is held back"); // for it has nothing to do
  }
  const end = performance.now();
  await Bun.sleep(QUIET);
  if (!isComplete()) fail(room, "a line came twice");
  return end;
}

// --- WebSockets --------------------------------------------------------------------------------
// The crowd makes and reads frames by itself (RFC 6455, section 5.2). Bun's `WebSocket` takes three
// times as long to read a frame as we do, and longer than a server takes to send one, so that the
// crowd would be the limit.

const TEXT = 0x81; // a whole message of text
const PING = 0x89;
const MASKED = 0x80;
const NO_MASK = [0, 0, 0, 0]; // a client has to mask what it sends; this leaves it as it is
const PONG = Buffer.from([0x8a, MASKED, ...NO_MASK]); // without a payload, as Bun's pings are

async function connectWebSocket(person: Person): Promise<Socket<Person>> {
  const { port } = person.room;
  const { promise: upgraded, resolve } = Promise.withResolvers<void>();
  const reader = new FrameReader(resolve);
  const handlers: SocketHandler<Person> = {
    ...HANDLERS,
    data(socket, chunk) {
      reader.read(socket, chunk);
    },
  };
  const socket = await Bun.connect({ hostname: HOST, port, data: person, socket: handlers });
  const request = [
    "GET /room HTTP/1.1",
    `Host: ${HOST}:${port}`,
    "Upgrade: websocket",
    "Connection: Upgrade",
    `Sec-WebSocket-Key: ${Buffer.alloc(16).toString("base64")}`,
    "Sec-WebSocket-Version: 13",
  ];
  socket.write(`${request.join("\r\n")}\r\n\r\n`);
  await upgraded;
  return socket;
}

/** Makes a frame of some lines, which are ASCII and less than 64 KiB. */
function encodeFrame(lines: string): Buffer {
  const { length } = lines;
  const size = length < 126 ? [MASKED | length] : [MASKED | 126, length >> 8, length & 0xff];
  const header = Buffer.from([TEXT, ...size, ...NO_MASK]);
  return Buffer.concat([header, Buffer.from(lines)]);
}

/** Reads what a server sends: the answer to the request first, and then frames. */
class FrameReader {
  private isUpgraded = false;
  private rest: Buffer = Buffer.alloc(0); // the beginning of an answer or of a header
  private payload = 0; // bytes of a frame that are still to come, without its header

  constructor(private readonly handleUpgrade: () => void) {}

  read(socket: Socket<Person>, chunk: Buffer): void {
    const bytes = this.rest.length > 0 ? Buffer.concat([this.rest, chunk]) : chunk;
    let place = this.isUpgraded ? 0 : this.readAnswer(socket.data.room, bytes);

    while (this.isUpgraded && place < bytes.length) {
      if (this.payload === 0) {
        const size = headerSize(bytes, place);
        if (place + size > bytes.length) break;
        if (bytes[place] === PING) socket.write(PONG);
        this.payload = payloadSize(bytes, place);
        place += size;
      }
      const end = Math.min(place + this.payload, bytes.length);
      this.payload -= end - place;
      receive(socket.data, bytes, place, end);
      place = end;
    }
    this.rest = bytes.subarray(place);
  }

  /** Returns where the answer ends, or 0 while it is not complete. */
  private readAnswer(room: Room, bytes: Buffer): number {
    const end = bytes.indexOf("\r\n\r\n");
    if (end === -1) return 0;
    if (!bytes.toString("latin1").startsWith("HTTP/1.1 101 ")) fail(room, "it opens no WebSocket");
    this.isUpgraded = true;
    this.handleUpgrade();
    return end + 4;
  }
}

/** Counts bytes, and makes text of them only for those who listen: that would cost far more. */
function receive(person: Person, bytes: Buffer, start: number, end: number): void {
  person.bytes += end - start;
  person.hear?.(bytes.toString("latin1", start, end));
}

/** How long the header is that begins here, or 2 while that cannot be told. */
function headerSize(bytes: Buffer, start: number): number {
  const size = bytes[start + 1] ?? 0;
  if (size < 126) return 2;
  return size === 126 ? 4 : 10;
}

/** How long the payload behind the header is. It is less than 4 GiB. */
function payloadSize(bytes: Buffer, start: number): number {
  const size = bytes[start + 1] ?? 0;
  if (size < 126) return size;
  return size === 126 ? bytes.readUInt16BE(start + 2) : bytes.readUInt32BE(start + 6);
}

// --- What it costs -----------------------------------------------------------------------------

type Usage = { time: number; server: number; waited: number; crowd: number; memory: number };

/** The time, the CPU times of server and crowd (all in ms since `before`), and memory (KiB). */
function usage({ server: { pid }, threads }: Room, before?: Usage): Usage {
  for (const thread of readdirSync(`/proc/${pid}/task`))
    try {
      const schedstat = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8");
      threads.set(
        thread,
        schedstat.split(" ", 2).map((ns) => Number(ns) / 1e6),
      );
    } catch {
      // The thread has just ended: what it had used by then still counts.
    }
  const sum = (i: number) => threads.values().reduce((sum, times) => sum + (times[i] ?? 0), 0);
  const { user, system } = process.cpuUsage();
  const resident = /VmRSS:\s*(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];
  return {
    time: performance.now() - (before?.time ?? 0),
    server: sum(0) - (before?.server ?? 0),
    waited: sum(1) - (before?.waited ?? 0),
    crowd: (user + system) / 1000 - (before?.crowd ?? 0),
    memory: Number(resident),
  };
}

/** Figures of a run by their titles, in the order of the tables, the most telling one first. */
type Samples = { [title: string]: number | number[] };
type Figures = { [title: string]: number };

/** Of the samples of all runs the percentile that the title names, or else the median. */
function summarize(runs: Samples[]): Figures {
  const figures: Figures = {};
  for (const title of Object.keys(runs[0] ?? {})) {
    const samples = runs.flatMap((run) => run[title] ?? []).sort((a, b) => a - b);
    const percent = Number(/\bp([\d.]+)/.exec(title)?.[1] ?? 50);
    figures[title] = samples[Math.floor((samples.length * percent) / 100)] ?? NaN;
  }
  return { ...figures, rounds: runs.length };
}

// --- The workloads -----------------------------------------------------------------------------

/** A line of 40 characters that says who of the people says it, and which of their lines it is. */
function compose(speaker: number, serial: number): string {
  return `what a lovely evening it is ${`${speaker}`.padStart(4, "0")}${`${serial}`.padStart(7, "0")}#`;
}

/** Lets one of the people say so many lines, with one write. */
function say(room: Room, speaker: number, lines: number, due = performance.now()): void {
  const socket = room.people[speaker];
  if (!socket || lines <= 0) return;
  const { spoken } = socket.data;
  const next = () => room.contender.say.replace("{text}", compose(speaker, spoken.push(due) - 1));
  room.total += lines;
  send(socket, Array.from({ length: lines }, next).join(""));
}

/**
 * Makes one of the people understand every word, and call `answer` with the lines heard of each.
 * Returns the latencies in ms, as they come.
 */
function listen(room: Room, listener: number, answer?: (heard: number[]) => void): number[] {
  const person = room.people.at(listener)?.data;
  const heard = room.people.map(() => 0);
  const latencies: number[] = [];
  let rest = "";
  const hear = (chunk: string) => {
    const now = performance.now();
    const lines = (rest + chunk).split("#");
    rest = lines.pop() ?? "";
    for (const line of lines) {
      const [speaker, serial] = [Number(line.slice(-11, -7)), Number(line.slice(-7))];
      if (serial !== heard[speaker]) fail(room, "a line is missing, or came twice");
      heard[speaker] = serial + 1;
      latencies.push(now - (room.people[speaker]?.data.spoken[serial] ?? NaN));
    }
    answer?.(heard);
  };
  if (person) person.hear = hear;
  answer?.(heard);
  return latencies;
}

function begin(room: Room): Usage {
  room.total = 0;
  for (const { data } of room.people) Object.assign(data, new Person(room));
  return usage(room);
}

/** Waits until everybody has heard the lines of all others. Returns what that has cost. */
async function finish(room: Room, before: Usage): Promise<Usage & { delivered: number }> {
  const { people, total, contender } = room;
  const { heard, echo, aside = "" } = contender;
  const length = heard.replace("{text}", compose(0, 0)).replace("{name}", NAME).length;
  const hasHeard = ({ data: { bytes, spoken } }: Socket<Person>) => {
    const surplus = bytes - length * (echo ? total : total - spoken.length);
    return surplus === 0 || surplus === aside.length;
  };
  const end = await settle(room, () => people.every(hasHeard));
  const delivered = total * (echo ? people.length : people.length - 1);
  return { ...usage(room, before), time: end - before.time, delivered };
}

/** Each speaker goes on when the last who joined has heard one of its lines. */
async function converse(room: Room, speakers: number, inFlight: number): Promise<Samples> {
  const { people } = room;
  const before = begin(room);
  const every = Math.floor(people.length / speakers);
  listen(room, Math.floor(Math.random() * (people.length - 1))); // all are counted, and one is read
  const latencies = listen(room, -1, (heard) => {
    if (performance.now() > before.time + SCALE.talk) return;
    // They sit all over the room, but the last who joined is none of them.
    for (let i = every >> 1; i < people.length; i += every)
      say(room, i, inFlight + (heard[i] ?? 0) - (people[i]?.data.spoken.length ?? 0));
  });
  await Bun.sleep(SCALE.talk);
  const { time, server, crowd, delivered } = await finish(room, before);
  return {
    "µs/line": (server / delivered) * 1000,
    "lines/s": (delivered / time) * 1000,
    "p50 ms": latencies,
    "p99 ms": latencies,
    "server %": (server / time) * 100,
    "crowd %": (crowd / time) * 100,
  };
}

/**
 * One after another speaks, whether the lines come through or not.
 *
 * In a room of 1000 that is 200,000 deliveries a second, and to read them all at once would make
 * the latency the crowd's own. So only two listen: the first who joined hears what the server itself
 * adds; before the last one hears a line, most servers make the system calls for all others. These
 * leave what comes to the kernel, and count it when the talking is over: it is 5 KiB where Linux
 * has room for 64, so nobody seems slow. The crowd does not sleep between the lines, because no
 * timer is exact to less than a millisecond.
 */
async function spendEvening(room: Room): Promise<Samples> {
  const before = begin(room);
  const [first, last] = [listen(room, 0), listen(room, -1)];
  const others = room.people.slice(1, -1);
  const lateness: number[] = [];
  for (const socket of others) socket.pause();
  for (let due = before.time; due < before.time + SCALE.evening; due += 1000 / LINES_A_SECOND) {
    while (performance.now() < due) await new Promise(setImmediate);
    lateness.push(performance.now() - due);
    say(room, 1 + (room.total % others.length), 1, due);
  }
  const bothHaveHeard = () => first.length === room.total && last.length === room.total;
  await settle(room, bothHaveHeard);
  for (const socket of others) socket.resume();
  const { time, server, delivered } = await finish(room, before);
  return {
    "µs/line": (server / delivered) * 1000,
    "p50 ms": first,
    "p99 ms": first,
    "p99.9 ms": first,
    "last p50": last,
    "server %": (server / time) * 100,
    "late p99": lateness,
  };
}

/** Many join, 200 at a time, and then sit there in silence. It can be done once with a server. */
async function arrive(room: Room): Promise<Samples> {
  const before = begin(room);
  const time = (await fill(room, SCALE.arrivals, 200)) - before.time;
  const { crowd } = usage(room, before);
  // Garbage is collected some time after: silence counts from when memory has last become less.
  let silence = usage(room);
  do {
    await Bun.sleep(50);
    const now = usage(room);
    if (now.memory < silence.memory) silence = now;
  } while (performance.now() < silence.time + SCALE.rest);
  const idle = usage(room, silence);
  stop(room);
  return {
    seconds: time / 1000,
    "KiB each": (silence.memory - before.memory) / SCALE.arrivals,
    "idle %": (idle.server / idle.time) * 100,
    "start ms": room.startTime,
    "crowd %": (crowd / time) * 100,
  };
}

type Workload = [title: string, people: number, run: (room: Room) => Promise<Samples>];
const { many, arrivals } = SCALE;
const WORKLOADS: Workload[] = [
  ["conversation", 100, (room) => converse(room, 20, 1)],
  ["burst", 100, (room) => converse(room, 20, 50)],
  ["conversation", many, (room) => converse(room, 50, 1)],
  ["evening", many, spendEvening],
  ["burst", many, (room) => converse(room, 50, 50)],
  ["arrival", arrivals, arrive],
];

// --- The tables --------------------------------------------------------------------------------

/** Lets a room do something. A server other than ours may be too slow, and that is its end. */
function attempt<T>(what: string, room: Room, run: () => Promise<T>): Promise<T | undefined> {
  progress(`${what}: ${room.contender.name}`);
  return run().catch((error) => {
    if (error !== TOO_SLOW || isOurs(room.contender)) fail(room, error.message);
    stop(room);
    return undefined;
  });
}

type Table = { [server: string]: Figures | string }; // or why there are none

/** Lets the rooms work in turns, as many rounds as each has time for. */
async function compare(rooms: Room[], [title, people, run]: Workload): Promise<Table> {
  const entries = rooms.map((room) => ({ room, runs: [] as Samples[], spent: 0 }));
  for (let round = 0; round < SCALE.rounds; round++)
    for (const entry of entries) {
      const { room, runs, spent } = entry;
      if (!running.has(room) || spent > SCALE.budget) continue;
      const begin = performance.now();
      const what = `${title} ${people}, round ${round + 1}`;
      const samples = await attempt(what, room, () => run(room));
      if (samples) runs.push(samples);
      entry.spent += performance.now() - begin;
    }
  const result = (runs: Samples[]) => (runs.length > 0 ? summarize(runs) : "too slow");
  return Object.fromEntries(entries.map(({ room, runs }) => [room.contender.name, result(runs)]));
}

/** Prints the figures of each server, with the ratio of the first one to ours. */
function print(workload: string, table: Table): void {
  const { format } = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
  const ours = Object.entries(table[OURS] ?? {});
  const rows = [[workload, "× ours", ...ours.map(([title]) => title)]];
  for (const [server, figures] of Object.entries(table)) {
    if (typeof figures === "string") {
      rows.push([server, figures]);
      continue;
    }
    const values = Object.values(figures);
    const ratio = (values[0] ?? NaN) / Number(ours[0]?.[1]);
    rows.push([server, ...[ratio, ...values].map(format)]);
  }
  progress("");
  for (const [first = "", ...cells] of rows)
    console.log(first.padEnd(20) + cells.map((cell) => cell.padStart(11)).join(""));
  console.log();
}

/** Says what is going on, in a terminal always on the same line. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
  else if (text) console.error(text);
}

// --- The program -------------------------------------------------------------------------------

async function main(): Promise<void> {
  process.on("exit", () => {
    progress("");
    running.forEach(kill);
    rmSync(FOLDER, { recursive: true, force: true });
  });
  for (const signal of ["SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"])
    process.on(signal, (_, number) => process.exit(128 + number));
  Bun.spawnSync(["taskset", "-acp", CROWD_CORE, `${process.pid}`]);
  const all = [...CONTENDERS, ...options.peers];
  const present = all.filter(isInstalled);
  const absent = all.filter((contender) => !isInstalled(contender)).map(({ name }) => name);
  const machine =
    `${cpus()[0]?.model}, ${cpus().length} cores (servers on ${SERVER_CORE}, crowd on ${CROWD_CORE}), ` +
    `${type()} ${release()}, Bun ${Bun.version}`;
  if (!options.json) console.log(`${machine}\nNot installed: ${absent.join(", ") || "nothing"}\n`);

  const results: { [workload: string]: Table } = {};
  for (const [people, workloads] of Map.groupBy(WORKLOADS, ([, people]) => people)) {
    const rooms: Room[] = [];
    for (const contender of present) {
      if (people > (contender.capacity ?? Infinity)) continue;
      const room = await start(contender);
      rooms.push(room);
      if (people === arrivals) continue;
      await attempt(`${people} people join`, room, async () => {
        await fill(room, people, 10, 3 * SCALE.patience);
        await converse(room, 20, 1); // what runs for the first time is not yet compiled
      });
    }
    for (const workload of workloads) {
      const title = `${workload[0]} ${people}`;
      const table = (results[title] = await compare(rooms, workload));
      for (const { name, capacity = Infinity } of present)
        if (people > capacity) table[name] = `holds ${capacity}`;
      if (!options.json) print(title, table);
    }
    rooms.forEach(stop);
  }
  if (options.json) console.log(JSON.stringify({ machine, absent, results }, null, 2));
  process.exit();
}

await main();
