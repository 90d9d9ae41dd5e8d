"use strict";

// What the page says, in Chinese; in any other language it says the English.
const CHINESE = {
  "Qwen on BM1684X": "BM1684X 上的 Qwen",
  "connecting …": "正在连接……",
  "Question": "问题",
  "Ask something. Enter sends.": "请输入问题，按回车发送",
  "Enter sends, Shift+Enter makes a new line": "回车发送，Shift+回车换行",
  "Send": "发送",
  "Stop": "停止",
  "Clear": "清空",
  "Settings": "设置",
  "Temperature": "温度",
  "0 is greedy": "0 表示贪心解码",
  "API key": "API key",
  "only where the service asks for one": "服务要求时才填",
  "{} on the {}, {} tokens": "{}，运行在{}上，最多 {} 个 token",
  "chip": "芯片",
  "simulator": "仿真器",
  "failed": "引擎打不开",
  "reopening": "正在重新打开引擎",
  "This model knows the answers to {} questions by heart, and nothing else. Some of them:":
    "这个模型只背下了 {} 个问题的答案，别的都不会。例如：",
  "The oldest turn is forgotten: the conversation no longer fits the compiled length.":
    "对话超出了编译时的长度，最早的一轮已被忘记。",
  "first token {} s": "首 token {} 秒",
  "measured on the chip": "芯片上实测",
  "simulator wall time": "仿真器墙钟时间",
  "stopped": "已停止",
  "cut: the limit of new tokens, or of S, is reached": "已截断：达到了新 token 数或 S 的上限",
  "The service ended the answer early.": "服务提前结束了回答。",
  "The service does not answer: is it running?": "服务没有响应：它在运行吗？",
  "The service does not answer.": "服务没有响应。"
};

const chinese = navigator.language.startsWith("zh");

// A text in the reader's language, with values in place of each {}.
function say(text, ...values) {
  return ((chinese && CHINESE[text]) || text).replace(/\{\}/g, () => values.shift());
}

// The page itself is written in English.
if (chinese) {
  document.documentElement.lang = "zh-CN";
  document.title = say(document.title);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode;
    node.data = node.data.replace(node.data.trim(), say(node.data.trim()));
  }
  for (const name of ["placeholder", "title", "aria-label"]) {
    for (const element of document.body.querySelectorAll(`[${name}]`)) {
      element.setAttribute(name, say(element.getAttribute(name)));
    }
  }
}
