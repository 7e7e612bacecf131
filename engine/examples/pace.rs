//! What a paced engine costs: starts one in a child process, holds N streams open and reads the child's CPU time.
//! `cargo run --release -p anabranch-engine --example pace -- [streams] [tokens/s each] [seconds]`

use std::io::BufRead;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anabranch_engine::synthetic::SyntheticParams;
use anabranch_engine::{EngineConfig, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "serve") {
        return serve(args[1].parse()?, args[2].parse()?);
    }
    let number = |at: usize, or: u64| args.get(at).map_or(Ok(or), |arg| arg.parse());
    let (streams, rate, seconds) = (number(0, 1024)?, number(1, 100)?, number(2, 20)?);
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", &streams.to_string(), &rate.to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut addr = String::new();
    std::io::BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut addr)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(measure(addr.trim(), child.id(), streams, rate, seconds));
    child.kill()?;
    child.wait()?;
    result
}

fn serve(streams: u32, rate: f64) -> Result<(), Box<dyn std::error::Error>> {
    let config = EngineConfig {
        rate: Some(rate),
        max_running: streams,
        kv_tokens: 1 << 30,
        context_capacity: 1 << 20,
        ..EngineConfig::synthetic(SyntheticParams::default())
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
    rate: u64,
    seconds: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut readers = tokio::task::JoinSet::new();
    for i in 0..streams {
        let mut stream = TcpStream::connect(addr).await?;
        let body = format!(
            "{{\"rid\":\"r{i:06}\",\"input_ids\":[1,2,{}],\"stream\":true,\"return_logprob\":true,\"sampling_params\":{{\"max_new_tokens\":1000000,\"sampling_seed\":{i}}}}}",
            i % 30_000
        );
        let head =
            format!("POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        readers.spawn(async move {
            let mut buf = vec![0; 16 << 10];
            while stream.read(&mut buf).await.is_ok_and(|n| n > 0) {}
        });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (made, cpu, at) = (made(addr).await?, cpu_seconds(pid)?, Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let wall = at.elapsed().as_secs_f64();
    let tokens = (self::made(addr).await? - made) as f64;
    let used = cpu_seconds(pid)? - cpu;
    println!(
        "{streams} streams x {rate} tok/s: {:.0} tok/s made, {:.3} cores, {:.2} us of CPU per token",
        tokens / wall,
        used / wall,
        used / tokens * 1e6
    );
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
