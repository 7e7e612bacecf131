//! What a paced engine costs: starts one in a child process, holds N streams open and reads the child's CPU time.
//! `cargo run --release -p anabranch-engine --example pace -- [streams] [tokens/s each] [seconds]`
//! With a checkpoint as fourth argument (feature `candle`) it runs unpaced, in requests of 14 + 12 tokens.

use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_engine::{EngineConfig, ModelSpec, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "serve") {
        return serve(args[1].parse()?, args[2].parse()?, args.get(3));
    }
    let number = |at: usize, or: u64| args.get(at).map_or(Ok(or), |arg| arg.parse());
    let (streams, rate, seconds) = (number(0, 1024)?, number(1, 100)?, number(2, 20)?);
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", &streams.to_string(), &rate.to_string()])
        .args(args.get(3))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut addr = String::new();
    std::io::BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut addr)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result =
        runtime.block_on(measure(addr.trim(), child.id(), streams, seconds, args.len() > 3));
    child.kill()?;
    child.wait()?;
    result
}

fn serve(
    streams: u32,
    rate: f64,
    checkpoint: Option<&String>,
) -> Result<(), Box<dyn std::error::Error>> {
    let config = EngineConfig {
        rate: Some(rate),
        max_running: streams,
        kv_tokens: 1 << 30,
        context_capacity: 1 << 20,
        ..EngineConfig::synthetic(SyntheticParams::default())
    };
    let config = match checkpoint {
        Some(dir) => EngineConfig { model: ModelSpec::Hf(dir.into()), rate: None, ..config },
        None => config,
    };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let server = Server::bind(config).await?;
        println!("{}", server.local_addr());
        Ok(server.run(CancellationToken::new()).await?)
    })
}

async fn measure(
    addr: &str,
    pid: u32,
    streams: u64,
    seconds: u64,
    short: bool,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut readers = tokio::task::JoinSet::new();
    for i in 0..streams {
        let stream = TcpStream::connect(addr).await?;
        readers.spawn(read(stream, i, if short { 12 } else { 1_000_000 }));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (made, cpu, at) = (made(addr).await?, cpu_seconds(pid)?, Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let wall = at.elapsed().as_secs_f64();
    let tokens = (self::made(addr).await? - made) as f64;
    let used = cpu_seconds(pid)? - cpu;
    println!(
        "{streams} streams: {:.0} tok/s made, {:.3} cores, {:.2} us of CPU per token",
        tokens / wall,
        used / wall,
        used / tokens * 1e6
    );
    Ok(())
}

/// One request after the other on one connection.
async fn read(mut stream: TcpStream, i: u64, new: u32) -> std::io::Result<()> {
    let mut buf = vec![0; 64 << 10];
    for round in 0u64.. {
        let prompt: Vec<String> =
            (0..14).map(|at| ((i * 31 + round * 7 + at) % 100).to_string()).collect();
        let body = format!(
            "{{\"rid\":\"r{i:06}-{round}\",\"input_ids\":[{}],\"stream\":true,\"return_logprob\":true,\"sampling_params\":{{\"max_new_tokens\":{new},\"ignore_eos\":true,\"sampling_seed\":{i}}}}}",
            prompt.join(",")
        );
        let head =
            format!("POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).await?;
        loop {
            let n = stream.read(&mut buf).await?;
            if n == 0 {
                return Ok(());
            }
            if buf[..n].ends_with(b"0\r\n\r\n") {
                break;
            }
        }
    }
    Ok(())
}

async fn made(addr: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let mut stream = TcpStream::connect(addr).await?;
    stream.write_all(b"GET /v1/loads HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let at = text.find("\"generated_tokens_total\":").ok_or("no counter")? + 25;
    let digits: String = text[at..].chars().take_while(char::is_ascii_digit).collect();
    Ok(digits.parse()?)
}

/// User and system time of a process; Linux counts them in ticks of 10 ms.
fn cpu_seconds(pid: u32) -> Result<f64, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().ok_or("odd stat")?.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}
