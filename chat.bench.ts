#!/usr/bin/env bun
/**
 * The benchmark of bun-chat: what it costs to pass a line to many people, here and elsewhere.
 *
 *     bun chat.bench.ts             takes about a minute
 *     bun chat.bench.ts --quick     takes ten seconds and is less exact
 *     bun chat.bench.ts --peer 'NAME=COMMAND {port}'     adds another Budget Chat server
 *
 * Each server is a process of its own. This process is the crowd: a socket for each of its people,
 * who speak, and count what arrives. The servers take turns, so that a machine that is busy with
 * something else for a while is unfair to all of them. The figure to trust is the CPU time that the
 * server spends on each line that it delivers to somebody: it depends least on who else uses the
 * machine. A run in which a line is missing or doubled gives no figures, and the benchmark fails.
 */

import { existsSync, readdirSync, readFileSync } from "node:fs";
import { cpus, release, type } from "node:os";
import { parseArgs } from "node:util";
import type { Socket, Subprocess } from "bun";

const QUIET = 20; // ms without a byte after which no more is to be expected
const HOST = "127.0.0.1";
const NAME = "user00000"; // all names are as long

// --- The servers -------------------------------------------------------------------------------

type Contender = { name: string; protocol: Protocol; command: string[] };

/** How to take part in a room that need not be a chat. Every {text} has 40 characters. */
type Protocol = {
  greeting: string; // the end of what one waits for before one joins
  join: string;
  joined: string; // the end of what comes next, and then one has joined
  say: string;
  heard: string; // what the others hear of it
  reply?: string; // what comes back to the one who has said it
  aside?: string; // what comes now and then besides
  most?: number; // people that it can hold
};

const BUDGET_CHAT: Protocol = {
  greeting: "\n",
  join: "{name}\n",
  joined: "\n",
  say: "{text}\n",
  heard: "[{name}] {text}\n",
};

// With RESP3 a subscriber may publish. It hears itself too, and then how many have heard it.
const REDIS: Protocol = {
  greeting: "",
  join: "HELLO 3\r\nSUBSCRIBE room\r\n",
  joined: "room\r\n:1\r\n",
  say: "*3\r\n$7\r\nPUBLISH\r\n$4\r\nroom\r\n$40\r\n{text}\r\n",
  heard: ">3\r\n$7\r\nmessage\r\n$4\r\nroom\r\n$40\r\n{text}\r\n",
  reply: ">3\r\n$7\r\nmessage\r\n$4\r\nroom\r\n$40\r\n{text}\r\n:{people}\r\n",
};

const NATS: Protocol = {
  greeting: "\n",
  join: 'CONNECT {"verbose":false,"echo":false}\r\nSUB room 1\r\nPING\r\n',
  joined: "PONG\r\n",
  say: "PUB room 40\r\n{text}\r\n",
  heard: "MSG room 1 40\r\n{text}\r\n",
  aside: "PING\r\n",
};

const NCAT: Protocol = {
  greeting: "",
  join: "",
  joined: "",
  say: "{text}\n",
  heard: "{text}\n",
  most: 1000, // it uses select(2), which ends at 1024 descriptors
};

/** The room as everybody writes it first, with a write per message and client. */
function naiveRoom(port: number): void {
  const people = new Map<NodeJS.WritableStream, string>();
  const broadcast = (line: string, sender: NodeJS.WritableStream) => {
    for (const person of people.keys()) if (person !== sender) person.write(line);
  };
  const { createServer } = process.getBuiltinModule("node:net");
  const server = createServer({ noDelay: true }, (socket) => {
    let rest = "";
    socket.write("Welcome to the chat! What is your name?\n");
    socket.on("data", (chunk) => {
      const lines = (rest + chunk).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) {
        const name = people.get(socket);
        if (name) broadcast(`[${name}] ${line}\n`, socket);
        else {
          socket.write(`* The room contains: ${[...people.values()].join(", ")}\n`);
          people.set(socket, line);
          broadcast(`* ${line} has joined the chat\n`, socket);
        }
      }
    });
    socket.on("error", () => {}).on("close", () => people.delete(socket));
  });
  server.listen({ port, host: "127.0.0.1", backlog: 512 });
}

const OURS = "bun-chat";
const CONTENDERS = [
  contender(OURS, BUDGET_CHAT, "{bun} {server} --quiet --rate 0 --max-clients 20000 --port {port}"),
  contender("naive, Bun", BUDGET_CHAT, "{bun} -e {naive}"),
  contender("naive, Node", BUDGET_CHAT, "node -e {naive}"),
  contender(
    "redis-server",
    REDIS,
    "redis-server --bind 127.0.0.1 --maxclients 15000 --port {port}",
  ),
  contender("nats-server", NATS, "nats-server -a 127.0.0.1 -p {port}"),
  contender("ncat --broker", NCAT, "ncat -l 127.0.0.1 {port} --broker --max-conns 15000"),
];

function contender(name: string, protocol: Protocol, command: string): Contender {
  const words = new Map([
    ["{bun}", process.execPath],
    ["{server}", `${import.meta.dir}/server.ts`],
    ["{naive}", `(${naiveRoom})({port})`],
  ]);
  const line = command.trim().split(/\s+/);
  return { name, protocol, command: line.map((word) => words.get(word) ?? word) };
}

type Server = { contender: Contender; port: number; process: Subprocess; started: number };

const running = new Set<Subprocess>();

/** Starts a server. It is there as soon as it can be connected to, after `started` ms. */
async function start(contender: Contender): Promise<Server> {
  const free = Bun.listen({ hostname: HOST, port: 0, socket: { data() {} } });
  const { port } = free;
  free.stop(true);
  const begin = performance.now();
  const command = contender.command.map((word) => word.replace("{port}", `${port}`));
  const server = Bun.spawn([...CORES.server, ...command], {
    stdio: ["ignore", "ignore", "ignore"],
  });
  running.add(server);
  for (;;) {
    const started = performance.now() - begin;
    try {
      (await Bun.connect({ hostname: HOST, port, socket: { data() {} } })).terminate();
      return { contender, port, process: server, started };
    } catch {
      if (server.exitCode !== null || started > SCALE.patience)
        throw new Error("it does not start");
      await Bun.sleep(1);
    }
  }
}

/** What puts the server on the first core that this process may use, and the crowd on the last. */
const CORES = (() => {
  const own = `${process.pid}`;
  const list = Bun.which("taskset") ? Bun.spawnSync(["taskset", "-cp", own]).stdout : "";
  const [first, last] = /: (\d+).*?(\d+)$/.exec(list.toString().trim())?.slice(1) ?? [];
  if (!first || !last) return { server: [], crowd: [] };
  return { server: ["taskset", "-c", first], crowd: ["taskset", "-acp", last, own] };
})();

// --- What a process costs ----------------------------------------------------------------------

const PROC = existsSync("/proc/self/schedstat");

/** The CPU time in ns of each thread of a process; without /proc that of all together, under 0. */
function cpuTime({ process: { pid } }: Server): Map<number, number> {
  const times = new Map<number, number>();
  if (!PROC) {
    const parts = ps("time", pid).split(":"); // 0:00.97, to the hundredth of a second
    return times.set(0, 1e9 * parts.reduce((sum, part) => 60 * sum + Number(part), 0));
  }
  for (const thread of readdirSync(`/proc/${pid}/task`))
    try {
      const [time] = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ");
      times.set(Number(thread), Number(time));
    } catch {
      // The thread has just ended.
    }
  return times;
}

/** The CPU time in ns that a server has used since `before`. */
function cpuSince(before: Map<number, number>, server: Server): number {
  let sum = 0;
  for (const [thread, time] of cpuTime(server)) sum += time - (before.get(thread) ?? 0);
  return sum;
}

/** Whether a server is at work, and not just waiting. */
async function isBusy(server: Server): Promise<boolean> {
  const before = cpuTime(server);
  await Bun.sleep(200);
  return cpuSince(before, server) > 20e6;
}

/** Resident memory in KiB. */
function memory({ process: { pid } }: Server): number {
  if (!PROC) return Number(ps("rss", pid));
  return Number(/VmRSS:\s*(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
}

function ps(column: string, pid: number): string {
  return Bun.spawnSync(["ps", "-o", `${column}=`, "-p", `${pid}`])
    .stdout.toString()
    .trim();
}

// --- The crowd ---------------------------------------------------------------------------------

/** All who are connected to one server. */
class Crowd {
  people: Socket<Person>[] = []; // those who have joined, in that order
  fault = ""; // the first thing that went wrong
  over = false;

  constructor(readonly server: Server) {}
}

/** One of them. It is `socket.data` of its socket. */
class Person {
  text: string | null = ""; // what came first, until it had joined
  waiting = true; // for the greeting
  roster = 0; // bytes that came in answer to its joining
  bytes = 0; // that came later, or since the run began
  said = 0; // lines in this run
  hear: ((text: string) => void) | undefined; // set for those who listen to every word

  constructor(
    readonly crowd: Crowd,
    readonly name: string,
  ) {}
}

const HANDLERS: Bun.SocketHandler<Person> = {
  open: (socket) => approach(socket, ""),
  data(socket, chunk) {
    const person = socket.data;
    if (person.text !== null) return approach(socket, person.text + chunk.toString("latin1"));
    person.bytes += chunk.length;
    person.hear?.(chunk.toString("latin1"));
  },
  close({ data: { crowd } }) {
    if (!crowd.over) crowd.fault ||= "it closed a connection";
  },
};

/** Lets `count` people join, so many at a time, or as many as can before the patience is over. */
async function assemble(server: Server, count: number, atATime: number): Promise<Crowd> {
  const crowd = new Crowd(server);
  const end = performance.now() + SCALE.patience;
  for (let next = 0; crowd.people.length < count && !crowd.fault; await Bun.sleep(1)) {
    if (performance.now() > end) return crowd;
    for (; next < Math.min(crowd.people.length + atATime, count); next++) {
      const data = new Person(crowd, NAME.slice(0, -`${next}`.length) + next);
      Bun.connect({ hostname: HOST, port: server.port, data, socket: HANDLERS }).catch((error) => {
        crowd.fault ||= String(error);
      });
    }
  }
  return crowd;
}

/** Goes on with somebody's joining, of which `text` has come so far. */
function approach(socket: Socket<Person>, text: string): void {
  const person = socket.data;
  const { people, server } = person.crowd;
  const { greeting, join, joined } = server.contender.protocol;
  person.text = text;
  const greeted = text.indexOf(greeting);
  if (greeted === -1) return;
  if (person.waiting) send(socket, join.replace("{name}", person.name));
  person.waiting = false;
  const end = text.indexOf(joined, greeted + greeting.length);
  if (end === -1) return;
  person.roster = end - greeted;
  person.bytes = text.length - end - joined.length;
  person.text = null;
  people.push(socket);
}

function send(socket: Socket<Person>, text: string): void {
  if (socket.write(text) !== text.length) socket.data.crowd.fault ||= "it does not read";
}

/** Waits until no byte has come for `quiet` ms. Returns when the last one came. */
async function settle({ people }: Crowd, quiet: number): Promise<number> {
  let [last, bytes] = [performance.now(), -1];
  while (performance.now() < last + quiet) {
    await Bun.sleep(1);
    const now = people.reduce((sum, { data }) => sum + data.bytes, 0);
    if (now !== bytes) [last, bytes] = [performance.now(), now];
  }
  return last;
}

/**
 * In a chat all names are in the rosters or announced later, each just once: so from each who has
 * joined to the next, rosters grow and what comes later shrinks by the same number of bytes.
 */
function checkArrival({ people, server: { contender } }: Crowd): string {
  const arrivals = people.map(({ data }) => data).sort((a, b) => a.roster - b.roster);
  const [, second, third] = arrivals;
  if (contender.protocol !== BUDGET_CHAT || !second || !third) return "";
  const [line, name] = [second.bytes - third.bytes, third.roster - second.roster];
  const wrong = arrivals.filter(({ bytes, roster }, i) => {
    if (i > 0 && roster !== second.roster + name * (i - 1)) return true;
    return bytes !== line * (people.length - 1 - i) || line === 0;
  });
  return wrong.length > 0 ? `${wrong.length} people did not hear of all others just once` : "";
}

function dissolve(crowd: Crowd): void {
  crowd.over = true;
  crowd.server.process.kill("SIGKILL");
  for (const socket of crowd.people) socket.terminate();
}

// --- Talking -----------------------------------------------------------------------------------

type Talk = {
  title: string;
  people: number;
  speakers: number;
  inFlight: number; // lines of a speaker on their way, of which one must come through before the next
  perSecond: number; // lines of all speakers a second, whether or not they come through
  duration: number; // ms
};

type Figures = { [title: string]: number }; // as in the tables, the most telling one first

/** A line of 40 characters that says which speaker's it is, and the how manieth of this run. */
function compose(speaker: number, serial: number): string {
  const numbers = String(speaker).padStart(4, "0") + String(serial).padStart(7, "0");
  return `#${numbers} what a lovely evening it is`;
}

/** A talk while it lasts. */
class Run {
  speakers: Socket<Person>[]; // they sit all over the room
  spoken: number[][]; // when each speaker said its lines, in ms
  total = 0; // lines
  latencies: number[] = []; // ms from saying a line to hearing it
  begin = performance.now();
  end: number; // ms; nothing is said after it

  constructor(
    readonly crowd: Crowd,
    readonly talk: Talk,
  ) {
    const every = crowd.people.length / talk.speakers;
    this.speakers = crowd.people.filter((_, i) => i % every === 0);
    this.spoken = this.speakers.map(() => []);
    this.end = this.begin + talk.duration;
    for (const { data } of crowd.people) [data.bytes, data.said, data.hear] = [0, 0, undefined];
  }
}

/** Lets a speaker say so many lines, with one write. */
function say(run: Run, index: number, lines: number): void {
  const [speaker, times] = [run.speakers[index], run.spoken[index]];
  if (!speaker || !times) return;
  const { protocol } = run.crowd.server.contender;
  let text = "";
  for (let i = 0; i < lines; i++) {
    text += protocol.say.replace("{text}", compose(index, times.length));
    times.push(performance.now());
  }
  run.total += lines;
  speaker.data.said += lines;
  send(speaker, text);
}

/** Makes one understand every word: are these the right lines, how late are they, who is next? */
function listen(run: Run, person: Person): void {
  const { crowd, talk, spoken, latencies } = run;
  const heard = spoken.map(() => 0); // lines of each speaker
  let rest = "";
  person.hear = (chunk) => {
    const now = performance.now();
    const text = rest + chunk;
    const news = new Map<number, number>();
    let at = text.indexOf("#");
    for (; at !== -1 && at + 12 <= text.length; at = text.indexOf("#", at + 12)) {
      const speaker = Number(text.slice(at + 1, at + 5));
      const serial = Number(text.slice(at + 5, at + 12));
      const next = heard[speaker] ?? NaN;
      if (serial !== next) crowd.fault ||= `line ${serial} of a speaker came instead of ${next}`;
      heard[speaker] = serial + 1;
      latencies.push(now - (spoken[speaker]?.[serial] ?? NaN));
      news.set(speaker, (news.get(speaker) ?? 0) + 1);
    }
    rest = at === -1 ? "" : text.slice(at);
    if (talk.inFlight && now < run.end) for (const [index, lines] of news) say(run, index, lines);
  };
}

/** How many bytes each has yet to hear: of what the others said, and in reply to its own lines. */
function missing({ crowd: { people, server }, total }: Run): number[] {
  const { heard, reply = "" } = server.contender.protocol;
  const length = (text: string) =>
    text
      .replace("{text}", compose(0, 0))
      .replace("{name}", NAME)
      .replace("{people}", `${people.length}`).length;
  const [line, own] = [length(heard), length(reply)];
  return people.map(({ data }) => (total - data.said) * line + data.said * own - data.bytes);
}

/**
 * One run of a talk. Most people only count bytes. Some listen to every word: one in 50, or where
 * lines wait for others only the last who joined, who as a rule is the last to hear.
 *
 * @returns a word instead of figures if the server is too slow
 * @throws if a line is missing or doubled
 */
async function converse(crowd: Crowd, talk: Talk): Promise<Figures | string> {
  const { people, server } = crowd;
  const { reply, aside = "" } = server.contender.protocol;
  const run = new Run(crowd, talk);
  const every = talk.inFlight ? people.length : 50;
  for (const [i, { data }] of people.entries()) if ((i + 1) % every === 0) listen(run, data);
  const ownTime = process.cpuUsage();
  const times = cpuTime(server);
  for (const index of run.speakers.keys()) if (talk.inFlight) say(run, index, talk.inFlight);
  for (; performance.now() < run.end && !crowd.fault; await Bun.sleep(1)) {
    const due = ((performance.now() - run.begin) / 1000) * talk.perSecond;
    while (run.total < due) say(run, run.total % talk.speakers, 1);
  }

  const complete = () => missing(run).every((bytes) => bytes <= 0);
  while (!complete() && !crowd.fault && performance.now() < run.end + SCALE.patience)
    await Bun.sleep(1);
  const took = performance.now() - run.begin;
  const cpu = cpuSince(times, server);
  const { user, system } = process.cpuUsage(ownTime);
  await settle(crowd, QUIET);
  const wrong = missing(run).filter((bytes) => bytes > 0 || bytes % (aside.length || Infinity));
  if (wrong.length > 0 && !crowd.fault && (await isBusy(server))) return "too slow";
  if (wrong.length > 0) {
    const lines = Math.max(...wrong) > 0 ? "lines are missing" : "lines came twice";
    crowd.fault ||= `${lines}, for ${wrong.length} of ${people.length} people`;
  }
  if (crowd.fault) throw new Error(crowd.fault);

  const delivered = run.total * (reply ? people.length : people.length - 1);
  const latencies = run.latencies.sort((a, b) => a - b);
  const percentile = (share: number) => latencies[Math.floor(share * latencies.length)] ?? NaN;
  return {
    "µs/line": cpu / 1000 / delivered,
    "lines/s": delivered / (took / 1000),
    "p50 ms": percentile(0.5),
    "p99 ms": percentile(0.99),
    "p99.9 ms": percentile(0.999),
    "server %": cpu / 1e4 / took,
    "crowd %": (user + system) / 10 / took,
  };
}

/** Lets the crowds talk in turns: a round for warming up, and then as many as a server has time. */
async function compare(crowds: Map<string, Crowd | string>, talk: Talk): Promise<Rows> {
  const rows: Rows = new Map();
  const spent = new Map<string, number>(); // ms
  const runs = new Map([...crowds.keys()].map((name): [string, Figures[]] => [name, []]));
  for (let round = 0; round <= SCALE.rounds; round++)
    for (const [name, crowd] of crowds) {
      const figures = runs.get(name) ?? [];
      const begin = performance.now();
      if (typeof rows.get(name) === "string" || (spent.get(name) ?? 0) > SCALE.budget) continue;
      progress(`${talk.title} ${talk.people}, round ${round} of ${SCALE.rounds}: ${name}`);
      const run = async () => (typeof crowd === "string" ? crowd : converse(crowd, talk));
      const result = await attempt(talk.title, name, run);
      if (typeof result === "object" && round > 0) figures.push(result);
      rows.set(name, typeof result === "string" ? result : median(figures));
      if (round > 0) spent.set(name, (spent.get(name) ?? 0) + performance.now() - begin);
    }
  return rows;
}

// --- Arriving ----------------------------------------------------------------------------------

/** Lets people join a server of their own, 200 at a time, and then sit there in silence. */
async function arrive(contender: Contender): Promise<Figures | string> {
  const server = await start(contender);
  const empty = memory(server);
  const ownTime = process.cpuUsage();
  const begin = performance.now();
  const crowd = await assemble(server, SCALE.arrivals, 200);
  const took = (await settle(crowd, QUIET)) - begin;
  const { user, system } = process.cpuUsage(ownTime);
  await settle(crowd, SCALE.silence);
  const full = memory(server);
  const times = cpuTime(server);
  await Bun.sleep(SCALE.silence);
  const idle = cpuSince(times, server);
  dissolve(crowd);
  if (!crowd.fault && crowd.people.length < SCALE.arrivals) return "too slow";
  crowd.fault ||= checkArrival(crowd);
  if (crowd.fault) throw new Error(crowd.fault);
  return {
    seconds: took / 1000,
    "KiB each": (full - empty) / SCALE.arrivals,
    "idle %": idle / 1e4 / SCALE.silence,
    "start ms": server.started,
    "crowd %": (user + system) / 10 / took,
  };
}

// --- The report --------------------------------------------------------------------------------

type Rows = Map<string, Figures | string>; // by contender; a word says why it has no figures

const results: { [workload: string]: { [server: string]: Figures | string } } = {};
const faults: string[] = [];

/** Prints a table, with the ratio of its first figure to that of our server. */
function report(workload: string, rows: Rows): void {
  progress("");
  results[workload] = Object.fromEntries(rows);
  const print = (first: string, cells: string[]) => {
    if (!options.json)
      console.log(first.padEnd(20) + cells.map((cell) => cell.padStart(10)).join(""));
  };
  const values = (row: Figures | string = "") => Object.values(row).map(Number);
  const titles = [...rows.values()].find((row) => typeof row === "object") ?? {};
  print(workload, ["× ours", ...Object.keys(titles)]);
  for (const [server, row] of rows) {
    const ratio = (values(row)[0] ?? NaN) / (values(rows.get(OURS))[0] ?? NaN);
    if (typeof row === "string") print(server, [row]);
    else print(server, [ratio, ...values(row)].map(readable));
  }
  if (!options.json) console.log();
}

/** Three digits, or more before the point; at most three behind it. */
function readable(figure: number): string {
  if (Number.isNaN(figure)) return "-";
  return figure.toFixed(Math.min(Math.max(2 - Math.floor(Math.log10(figure)), 0), 3));
}

/** The median of each figure. */
function median(runs: Figures[]): Figures {
  const middle = (title: string) =>
    runs.map((run) => run[title] ?? NaN).sort((a, b) => a - b)[runs.length >> 1] ?? NaN;
  return Object.fromEntries(Object.keys(runs[0] ?? {}).map((title) => [title, middle(title)]));
}

/** What goes wrong in `run` becomes a line at the end and a word in the table. */
async function attempt<T>(
  workload: string,
  name: string,
  run: () => Promise<T>,
): Promise<T | string> {
  try {
    return await run();
  } catch (error) {
    faults.push(`${workload}, ${name}: ${error instanceof Error ? error.message : error}`);
    return "failed";
  }
}

/** Says what is going on, in a terminal always on the same line. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
  else if (text) console.error(text);
}

// --- The program -------------------------------------------------------------------------------

const USAGE = `Usage: bun chat.bench.ts [options]

Measures the server beside this file against the naive room, whatever else is installed of Node,
Redis, NATS and ncat, and the peers that you name.

  conversation   some of the people speak, each its next line when its last has come through
  burst          the same with 50 lines of each speaker on their way
  evening        200 lines a second in all, whether they come through or not
  arrival        many join, 200 at a time, and then sit there in silence

  --quick                        takes ten seconds, with fewer people and rounds
  --json                         prints the figures as JSON
  --peer 'NAME=COMMAND {port}'   adds another Budget Chat server, and may be repeated
  --help                         shows this text`;

function readOptions() {
  try {
    const { values } = parseArgs({
      options: {
        quick: { type: "boolean", default: false },
        json: { type: "boolean", default: false },
        peer: { type: "string", multiple: true, default: [] },
        help: { type: "boolean" },
      },
    });
    if (values.help) {
      console.log(USAGE);
      process.exit(0);
    }
    return { ...values, peers: values.peer.map(readPeer) };
  } catch (error) {
    const [what] = (error instanceof Error ? error.message : String(error)).split(/\.\s/);
    console.error(`${what}. See bun chat.bench.ts --help.`);
    process.exit(2);
  }
}

function readPeer(text: string): Contender {
  const [, name = "", command = ""] = /^(.+?)=(.*{port}.*)$/.exec(text) ?? [];
  const peer = contender(name, BUDGET_CHAT, command);
  if (Bun.which(peer.command[0] ?? "")) return peer;
  throw new Error(`--peer takes 'NAME=COMMAND {port}' with a program that exists, not "${text}"`);
}

const options = readOptions();
const SCALE = options.quick
  ? { rounds: 1, duration: 50, budget: 0, patience: 1_000, many: 200, arrivals: 500, silence: 100 }
  : {
      rounds: 5,
      duration: 150,
      budget: 1_000,
      patience: 5_000,
      many: 1_000,
      arrivals: 5_000,
      silence: 500,
    };

const { duration, many } = SCALE;
// prettier-ignore
const TALKS: Talk[] = [
  { title: "conversation", people: 100, speakers: 20, inFlight: 1, perSecond: 0, duration },
  { title: "burst", people: 100, speakers: 20, inFlight: 50, perSecond: 0, duration },
  { title: "conversation", people: many, speakers: 50, inFlight: 1, perSecond: 0, duration },
  { title: "evening", people: many, speakers: many / 5, inFlight: 0, perSecond: 200, duration: 5 * duration },
  { title: "burst", people: many, speakers: 50, inFlight: 50, perSecond: 0, duration },
];

/** Starts a server and fills its room. Returns a word if the server is too slow for that. */
async function gather(contender: Contender, people: number): Promise<Crowd | string> {
  const crowd = await assemble(await start(contender), people, 10);
  await settle(crowd, QUIET);
  const slow = crowd.people.length < people && !crowd.fault;
  if (!slow) crowd.fault ||= checkArrival(crowd);
  if (slow || crowd.fault) dissolve(crowd);
  if (crowd.fault) throw new Error(crowd.fault);
  return slow ? "too slow" : crowd;
}

async function main(): Promise<void> {
  if (CORES.crowd.length > 0) Bun.spawnSync(CORES.crowd);
  process.on("exit", () => running.forEach((server) => server.kill("SIGKILL")));
  process.on("SIGINT", () => process.exit(130)).on("SIGTERM", () => process.exit(143));
  const all = [...CONTENDERS, ...options.peers];
  const present = all.filter(({ command: [program = ""] }) => Bun.which(program));
  const absent = all.filter((contender) => !present.includes(contender)).map(({ name }) => name);
  const machine = `${cpus()[0]?.model}, ${cpus().length} cores, ${type()} ${release()}, Bun ${Bun.version}`;
  if (!options.json) console.log(`${machine}\nNot installed: ${absent.join(", ") || "nothing"}\n`);

  for (const people of new Set(TALKS.map((talk) => talk.people))) {
    const crowds = new Map<string, Crowd | string>();
    for (const contender of present) {
      const { name } = contender;
      progress(`${people} people join: ${name}`);
      crowds.set(name, await attempt("joining", name, () => gather(contender, people)));
    }
    for (const talk of TALKS.filter((talk) => talk.people === people))
      report(`${talk.title} ${people}`, await compare(crowds, talk));
    for (const crowd of crowds.values()) if (typeof crowd === "object") dissolve(crowd);
  }
  const rows: Rows = new Map();
  for (const contender of present) {
    if (contender.protocol.most) continue;
    progress(`${SCALE.arrivals} people join: ${contender.name}`);
    rows.set(contender.name, await attempt("arrival", contender.name, () => arrive(contender)));
  }
  report(`arrival ${SCALE.arrivals}`, rows);

  if (options.json) console.log(JSON.stringify({ machine, absent, results, faults }, null, 2));
  for (const fault of faults) console.error(fault);
  process.exit(faults.length > 0 ? 1 : 0);
}

await main();
